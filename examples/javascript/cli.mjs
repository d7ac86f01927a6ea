// Classify images from the command line: node cli.mjs IMAGE… (the variable VITSERVE_URL names another server)
import { readFileSync } from "node:fs";
import { classify } from "./client.mjs";

const url = process.env.VITSERVE_URL ?? "http://127.0.0.1:8000";
for (const path of process.argv.slice(2)) {
  const predictions = await classify(readFileSync(path), { url, topK: 3 });
  const classes = predictions.map((item) => `${item.label} ${(100 * item.probability).toFixed(1)}%`);
  console.log(`${path}: ${classes.join(", ")}`);
}

-- Sends the complete HTTP requests in the files given after "--" in turn, and prints one line of JSON at the end.
local requests, turn = {}, 0

function init(paths)
  for index, path in ipairs(paths) do
    local file = assert(io.open(path, "rb"))
    requests[index] = file:read("*a")
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('{"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p99_ms": %.4f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end

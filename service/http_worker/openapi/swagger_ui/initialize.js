// Starts Swagger UI. It loads nothing from another host: validatorUrl would send the document to one.
const element = document.getElementById("swagger-ui");
SwaggerUIBundle({
  domNode: element,
  url: element.dataset.document,
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});

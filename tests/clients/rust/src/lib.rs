//! The client that progenitor makes of the OpenAPI document, as it makes it: nothing is patched.

progenitor::generate_api!(spec = "../../../openapi/ballast-3.0.json");

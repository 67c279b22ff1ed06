//! The API's own description.

use axum::extract::RawQuery;
use axum::response::Response;
use utoipa::ToSchema;

use super::json_bytes;
use crate::error::ApiError;
use crate::openapi::{OPENAPI_3_0, OPENAPI_3_1};

/// Version of OpenAPI.
#[derive(ToSchema)]
enum Version {
    #[schema(rename = "3.1")]
    V3_1,
    #[schema(rename = "3.0")]
    V3_0,
}

impl Version {
    /// Asked for with or without the last part.
    fn of(text: &str) -> Option<Self> {
        match text {
            "3.1" | "3.1.0" => Some(Self::V3_1),
            "3.0" | "3.0.3" => Some(Self::V3_0),
            _ => None,
        }
    }
}

/// Describe the API
///
/// As OpenAPI 3.1, or 3.0 for generators that need it.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "getOpenApi", tag = "vmm",
    params((
        "version" = inline(Option<Version>), Query, nullable = false,
        description = "`3.1` (the default) or `3.0`", example = "3.0"
    )),
    responses((status = 200, description = "The document.", body = serde_json::Value)),
)]
pub async fn openapi(RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let query = query.unwrap_or_default();
    let version = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("version="));
    match version.map_or(Some(Version::V3_1), Version::of) {
        Some(Version::V3_1) => Ok(json_bytes(OPENAPI_3_1)),
        Some(Version::V3_0) => Ok(json_bytes(OPENAPI_3_0)),
        None => Err(
            ApiError::bad_request("invalid", "version: must be 3.1 or 3.0").with_field("version"),
        ),
    }
}

//! Token buckets for bandwidth and operations.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::Invalid;

/// Limits on bandwidth (tokens are bytes) and operations (tokens are requests).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// A bucket that holds `size` tokens and is filled evenly from empty to full in `refill_time`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens the bucket holds.
    #[schema(minimum = 1)]
    pub size: u64,
    /// Extra tokens, spent first and never refilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds from empty to full.
    #[schema(minimum = 1)]
    pub refill_time: u64,
}

impl RateLimiterConfig {
    /// Checks sizes and times.
    pub fn validate(&self) -> Result<(), Invalid> {
        for (name, bucket) in [("bandwidth", &self.bandwidth), ("ops", &self.ops)] {
            let Some(bucket) = bucket else { continue };
            if bucket.size == 0 {
                return Err(Invalid::new(format!("{name}.size"), "must be at least 1"));
            }
            if bucket.refill_time == 0 {
                return Err(Invalid::new(
                    format!("{name}.refill_time"),
                    "must be at least 1 ms",
                ));
            }
        }
        Ok(())
    }
}

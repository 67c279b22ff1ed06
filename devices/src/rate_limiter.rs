//! Token buckets for bandwidth and operations.
//!
//! Pure: the caller says what time it is. A bucket is filled evenly, `size` tokens in
//! `refill_time`, and starts full; a one-time burst comes on top, is spent first and never comes
//! back.
//!
//! A request of any size passes as soon as there is a token, and may leave the bucket in debt,
//! which is paid off before anything else passes: the long-run rate holds, and over any stretch of
//! time no more is let through than the bucket's size plus what was filled in meanwhile (plus the
//! burst, once, and all of the last request). If a request had to wait for as many tokens as it
//! takes, those who share the limiter and ask for less would take them away before its eyes.

use std::time::Duration;

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
    #[schema(minimum = 1, maximum = 4294967295_u64)]
    pub refill_time: u64,
}

/// The longest refill time, about 50 days.
const MAX_REFILL_MS: u64 = u32::MAX as u64;

impl RateLimiterConfig {
    /// Checks sizes and times.
    pub fn validate(&self) -> Result<(), Invalid> {
        for (name, bucket) in [("bandwidth", &self.bandwidth), ("ops", &self.ops)] {
            let Some(bucket) = bucket else { continue };
            if bucket.size == 0 {
                return Err(Invalid::new(format!("{name}.size"), "must be at least 1"));
            }
            if !(1..=MAX_REFILL_MS).contains(&bucket.refill_time) {
                return Err(Invalid::new(
                    format!("{name}.refill_time"),
                    format!("must be 1 to {MAX_REFILL_MS} ms"),
                ));
            }
        }
        Ok(())
    }
}

/// A bucket of tokens.
///
/// The level is counted in tokens times nanoseconds of refill time, so that nothing is ever
/// rounded: a nanosecond adds `size` of these units, a token costs `refill_ns` of them.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    size: u64,
    refill_ns: u64,
    burst: u64,
    /// At most `size * refill_ns`; negative while in debt.
    level: i128,
    filled_at: Duration,
}

impl TokenBucket {
    /// A full bucket at the time `now`.
    pub fn new(config: &TokenBucketConfig, now: Duration) -> Self {
        // `validate` has refused the values that are clamped here.
        let size = config.size.max(1);
        let refill_ns = config.refill_time.clamp(1, MAX_REFILL_MS) * 1_000_000;
        Self {
            size,
            refill_ns,
            burst: config.one_time_burst.unwrap_or(0),
            level: i128::from(size) * i128::from(refill_ns),
            filled_at: now,
        }
    }

    /// How long until `tokens` could be taken; zero where they can be now.
    pub fn wait(&mut self, tokens: u64, now: Duration) -> Duration {
        self.fill(now);
        let rest = tokens.saturating_sub(self.burst);
        if rest == 0 {
            return Duration::ZERO;
        }
        let missing = i128::from(self.refill_ns) - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let size = i128::from(self.size);
        let nanos = (missing + size - 1) / size;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `tokens`; to be called when [`TokenBucket::wait`] has just said zero.
    pub fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let cost = i128::from(tokens - from_burst) * i128::from(self.refill_ns);
        self.level = self.level.saturating_sub(cost);
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_nanos();
        self.filled_at = self.filled_at.max(now);
        let full = i128::from(self.size) * i128::from(self.refill_ns);
        // Bounded, so that the product can't overflow: 2^64 ns are 584 years.
        let elapsed = i128::from(u64::try_from(elapsed).unwrap_or(u64::MAX));
        let gained = elapsed.saturating_mul(i128::from(self.size));
        self.level = self.level.saturating_add(gained).min(full);
    }
}

/// Both limits of a device.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter with full buckets at the time `now`; `None` where nothing is limited.
    pub fn new(config: &RateLimiterConfig, now: Duration) -> Option<Self> {
        let bucket = |config: &Option<TokenBucketConfig>| {
            config.as_ref().map(|config| TokenBucket::new(config, now))
        };
        let limiter = Self {
            bandwidth: bucket(&config.bandwidth),
            ops: bucket(&config.ops),
        };
        (limiter.bandwidth.is_some() || limiter.ops.is_some()).then_some(limiter)
    }

    /// Lets one request of `bytes` pass, or says how long to wait before asking again; then
    /// nothing is taken.
    pub fn admit(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        let mut wait = Duration::ZERO;
        let mut buckets = [(&mut self.bandwidth, bytes), (&mut self.ops, 1)];
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                wait = wait.max(bucket.wait(*tokens, now));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.take(*tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, burst: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig {
            size,
            one_time_burst: Some(burst),
            refill_time,
        }
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn the_burst_is_spent_first_and_never_comes_back() {
        let mut limiter = TokenBucket::new(&bucket(10, 100, 1000), ms(0));
        for _ in 0..11 {
            assert_eq!(limiter.wait(10, ms(0)), ms(0));
            limiter.take(10);
        }
        assert_eq!(limiter.wait(1, ms(0)), ms(100));
        assert_eq!(limiter.wait(10, ms(1_000_000)), ms(0));
        limiter.take(10);
        assert_eq!(limiter.wait(10, ms(1_000_000)), ms(100));
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let mut limiter = TokenBucket::new(&bucket(10, 0, 1000), ms(0));
        assert_eq!(limiter.wait(35, ms(0)), ms(0));
        limiter.take(35);
        assert_eq!(limiter.wait(1, ms(0)), ms(2600));
        assert_eq!(limiter.wait(35, ms(0)), ms(2600));
        assert_eq!(limiter.wait(1, ms(2600)), ms(0));
    }

    #[test]
    fn both_limits_hold_and_a_refusal_takes_nothing() {
        let config = RateLimiterConfig {
            bandwidth: Some(bucket(1000, 0, 1000)),
            ops: Some(bucket(1, 0, 100)),
        };
        let mut limiter = RateLimiter::new(&config, ms(0)).unwrap();
        assert_eq!(limiter.admit(600, ms(0)), Ok(()));
        assert_eq!(limiter.admit(100, ms(0)), Err(ms(100)));
        assert_eq!(limiter.admit(600, ms(100)), Ok(()));
        assert_eq!(limiter.admit(1, ms(200)), Err(ms(1)));
        assert_eq!(limiter.admit(1, ms(201)), Ok(()));
        assert!(RateLimiter::new(&RateLimiterConfig::default(), ms(0)).is_none());
    }

    #[test]
    fn a_queue_of_large_requests_is_not_starved_by_one_of_small_requests() {
        let config = RateLimiterConfig {
            bandwidth: Some(bucket(1 << 20, 0, 10)),
            ops: None,
        };
        let mut limiter = RateLimiter::new(&config, ms(0)).unwrap();
        // Each always has another request, and asks again when it is told to. Of two that are to
        // wake at once, it is the first to wake that was the last time the last.
        let mut queues = [(4 << 10, ms(0), 0), (1 << 20, ms(0), 0)];
        for tick in 0..100_000 {
            let now = Duration::from_micros(10) * tick;
            let mut any = false;
            for (bytes, retry, passed) in &mut queues {
                if now >= *retry {
                    match limiter.admit(*bytes, now) {
                        Ok(()) => (*passed, any) = (*passed + 1, true),
                        Err(wait) => *retry = now + wait,
                    }
                }
            }
            if any {
                queues.reverse();
            }
        }
        for (bytes, _, passed) in queues {
            assert!(
                passed >= 40,
                "only {passed} requests of {bytes} in a second"
            );
        }
    }

    #[test]
    fn refill_times_and_sizes_out_of_range_are_refused() {
        for (size, refill_time, field) in [
            (0, 1, "ops.size"),
            (1, 0, "ops.refill_time"),
            (1, u64::MAX, "ops.refill_time"),
        ] {
            let config = RateLimiterConfig {
                bandwidth: None,
                ops: Some(bucket(size, 0, refill_time)),
            };
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }

    #[test]
    fn extreme_values_do_not_overflow() {
        let mut limiter = TokenBucket::new(&bucket(u64::MAX, u64::MAX, u64::MAX), ms(0));
        for now in [Duration::ZERO, Duration::MAX] {
            for _ in 0..4 {
                limiter.wait(u64::MAX, now);
                limiter.take(u64::MAX);
            }
        }
    }

    proptest! {
        #[test]
        fn no_window_sees_more_than_size_plus_refill_plus_burst_before_its_last_request(
            size in 1_u64..10_000,
            burst in 0_u64..20_000,
            refill_time in 1_u64..5_000,
            requests in proptest::collection::vec((1_u64..10_000, 0_u64..50_000_000), 1..80),
        ) {
            let mut limiter = TokenBucket::new(&bucket(size, burst, refill_time), ms(0));
            let mut now = Duration::ZERO;
            let mut passed: Vec<(Duration, u64)> = Vec::new();
            for (tokens, gap_ns) in requests {
                now += Duration::from_nanos(gap_ns);
                if limiter.wait(tokens, now).is_zero() {
                    limiter.take(tokens);
                    passed.push((now, tokens));
                }
            }
            for first in 0..passed.len() {
                let mut sum = 0_u128;
                for &(at, tokens) in &passed[first..] {
                    let window = (at - passed[first].0).as_nanos();
                    let refilled = window * u128::from(size) / (u128::from(refill_time) * 1_000_000);
                    prop_assert!(sum <= u128::from(size) + u128::from(burst) + refilled);
                    sum += u128::from(tokens);
                }
            }
        }

        #[test]
        fn a_request_of_any_size_passes_after_the_wait_it_was_told(
            size in 1_u64..u64::MAX,
            burst in 0_u64..1_000_000,
            refill_time in 1_u64..100_000,
            requests in proptest::collection::vec(1_u64..u64::MAX, 1..20),
        ) {
            let mut limiter = TokenBucket::new(&bucket(size, burst, refill_time), ms(0));
            let mut now = Duration::ZERO;
            for tokens in requests {
                let tokens = tokens % size.saturating_mul(8).max(1) + 1;
                now += limiter.wait(tokens, now);
                prop_assert_eq!(limiter.wait(tokens, now), Duration::ZERO);
                limiter.take(tokens);
            }
        }
    }
}

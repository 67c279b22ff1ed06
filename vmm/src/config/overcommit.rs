//! The overcommit policy of a VM: what it is guaranteed, what it may have, and how the governor
//! ([`crate::overcommit`]) moves it between the two.
//!
//! ```text
//!  0 ──────────── guaranteed_size ─────────────── max_size ──── memory.size
//!    never taken                   │ the governor's to take    │ never given in mode auto
//! ```
//!
//! A new field is one line in the struct, its default, and its check in
//! [`OvercommitConfig::validate`]. Fields that are not here are refused: who writes one means a
//! promise that would not be kept.

use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmConfig;
use crate::error::Error;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// The least that mode auto leaves to a guest: the smallest RAM a VM can have.
const GUARANTEE_MIN: u64 = 16 * MIB;
/// The least and the most that a balloon moves in one step unless the configuration says so.
const DEFAULT_STEP: (u64, u64) = (4 * MIB, 256 * MIB);

/// Who decides how large the first balloon is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OvercommitMode {
    /// The client, by `vm.resize-balloon`; the guarantee holds all the same.
    #[default]
    Off,
    /// The governor in the VMM. It drives the first balloon; where there is none it waits until
    /// one is plugged.
    Auto,
}

/// What the VM is guaranteed, and what else may be taken from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"mode": "auto", "guaranteed_size": 167772160, "weight": 100}))]
pub struct OvercommitConfig {
    /// Who decides.
    #[serde(default)]
    pub mode: OvercommitMode,
    /// Bytes that no balloon takes from the guest, whoever asks: a multiple of 4096. When absent,
    /// half of `max_size` in mode auto; in mode off no balloon is held back, and the host has to
    /// have all RAM, as without a policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096, example = 167772160)]
    pub guaranteed_size: Option<u64>,
    /// Bytes the governor lets the guest have at most: a multiple of 4096, at most RAM. When
    /// absent, all RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096, example = 536870912)]
    pub max_size: Option<u64>,
    /// How much this VM counts beside the others on the host: one of twice the weight gives half
    /// as much of what it does not need.
    #[serde(default = "weight")]
    #[schema(minimum = 1, maximum = 10000)]
    pub weight: u32,
    /// What the guest keeps beyond what it uses, in percent of what it uses; never less than a
    /// sixteenth of RAM.
    #[serde(default = "buffer_percent")]
    #[schema(minimum = 1, maximum = 200)]
    pub buffer_percent: u32,
    /// Bytes the governor takes at most in one step: a multiple of 4096, at least 1 MiB. When
    /// absent, a twentieth of RAM, from 4 MiB to 256 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576, multiple_of = 4096, example = 26214400)]
    pub step: Option<u64>,
    /// Milliseconds between two looks of the governor.
    #[serde(default = "interval_ms")]
    #[schema(minimum = 100, maximum = 60000)]
    pub interval_ms: u32,
    /// The host is under pressure when less of its memory than this many percent is available.
    #[serde(default = "host_free_percent")]
    #[schema(minimum = 1, maximum = 50)]
    pub host_free_percent: u32,
    /// This VM's share of CPU time against others, where they want more than there is: cpu.weight
    /// of the process's cgroup, which is 100 unless somebody says otherwise. Refused where the
    /// process has no cgroup (v2) for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10000, example = 300)]
    pub cpu_weight: Option<u32>,
    /// The most CPU time that the vCPUs together may use, however idle the host is. Refused where
    /// the process has no cgroup (v2) for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<CpuMax>,
}

/// A limit on CPU time: cpu.max and cpu.max.burst of cgroup v2, for the vCPUs. Threads of devices
/// and of the VMM are not held up by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"quota_us": 150000, "period_us": 100000, "burst_us": 100000}))]
pub struct CpuMax {
    /// Microseconds of CPU time in each period; 150000 of 100000 are one and a half CPUs.
    #[schema(minimum = 1000, maximum = 1000000000)]
    pub quota_us: u64,
    /// Microseconds of a period.
    #[serde(default = "CpuMax::period")]
    #[schema(minimum = 1000, maximum = 1000000)]
    pub period_us: u64,
    /// Microseconds left over from earlier periods that may be used up at once, at most
    /// `quota_us`. When absent, a period or the quota, whichever is less: with 0, a guest that is
    /// just a little above its quota has all of its vCPUs stand still together in every period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1000000000)]
    pub burst_us: Option<u64>,
}

impl CpuMax {
    /// The kernel's own period.
    pub const PERIOD_US: u64 = 100_000;
    const QUOTA_MOST_US: u64 = 1_000_000_000;

    fn period() -> u64 {
        Self::PERIOD_US
    }

    /// Microseconds that may be saved up.
    pub fn burst(&self) -> u64 {
        self.burst_us.unwrap_or(self.period_us.min(self.quota_us))
    }

    fn validate(&self) -> Result<(), Invalid> {
        for (field, value, least, most) in [
            ("quota_us", self.quota_us, 1000, Self::QUOTA_MOST_US),
            ("period_us", self.period_us, 1000, 1_000_000),
        ] {
            if !(least..=most).contains(&value) {
                let reason = format!("is {value}, must be from {least} to {most}");
                return Err(Invalid::new(field, reason));
            }
        }
        if self.burst() > self.quota_us {
            let reason = format!("is more than `quota_us`, {}", self.quota_us);
            return Err(Invalid::new("burst_us", reason));
        }
        Ok(())
    }
}

fn weight() -> u32 {
    100
}

fn buffer_percent() -> u32 {
    20
}

fn interval_ms() -> u32 {
    1000
}

fn host_free_percent() -> u32 {
    20
}

impl Default for OvercommitConfig {
    fn default() -> Self {
        Self {
            mode: OvercommitMode::Off,
            guaranteed_size: None,
            max_size: None,
            weight: weight(),
            buffer_percent: buffer_percent(),
            step: None,
            interval_ms: interval_ms(),
            host_free_percent: host_free_percent(),
            cpu_weight: None,
            cpu_max: None,
        }
    }
}

impl OvercommitConfig {
    /// Fills in what depends on the VM's RAM, so that `vm.info` tells what holds.
    pub fn fill_in(&mut self, ram: u64) {
        let max = *self.max_size.get_or_insert(ram);
        if self.mode == OvercommitMode::Auto {
            let half = (max / 2 / PAGE * PAGE).max(GUARANTEE_MIN).min(max);
            self.guaranteed_size.get_or_insert(half);
        }
        let (least, most) = DEFAULT_STEP;
        self.step
            .get_or_insert((ram / 20 / PAGE * PAGE).clamp(least, most));
    }

    /// Checks all of it against the VM's RAM.
    pub fn validate(&self, ram: u64) -> Result<(), Invalid> {
        let mut filled = self.clone();
        filled.fill_in(ram);
        let (guaranteed, max) = (filled.guaranteed_size(), filled.max_size(ram));
        let refuse = |field: &str, reason: String| Err(Invalid::new(field, reason));
        for (field, size) in [
            ("guaranteed_size", guaranteed),
            ("max_size", max),
            ("step", filled.step_size()),
        ] {
            if !size.is_multiple_of(PAGE) {
                return refuse(field, format!("{size} is not a multiple of {PAGE} bytes"));
            }
        }
        if max > ram {
            return refuse(
                "max_size",
                format!("{max} is more than the {ram} bytes of RAM"),
            );
        }
        if guaranteed > max {
            return refuse(
                "guaranteed_size",
                format!("{guaranteed} is more than `max_size`, {max}"),
            );
        }
        if self.mode == OvercommitMode::Auto && guaranteed < GUARANTEE_MIN {
            return refuse(
                "guaranteed_size",
                format!("{guaranteed} is too little for mode auto: at least {GUARANTEE_MIN}"),
            );
        }
        if filled.step_size() < MIB || filled.step_size() > ram {
            return refuse("step", format!("must be from {MIB} to {ram}, all of RAM"));
        }
        for (field, value, least, most) in [
            ("weight", self.weight, 1, 10_000),
            ("buffer_percent", self.buffer_percent, 1, 200),
            ("interval_ms", self.interval_ms, 100, 60_000),
            ("host_free_percent", self.host_free_percent, 1, 50),
        ] {
            if !(least..=most).contains(&value) {
                return refuse(field, format!("is {value}, must be from {least} to {most}"));
            }
        }
        if let Some(weight) = self.cpu_weight
            && !(1..=10_000).contains(&weight)
        {
            let reason = format!("is {weight}, must be from 1 to 10000");
            return refuse("cpu_weight", reason);
        }
        if let Some(max) = &self.cpu_max {
            max.validate().map_err(|e| e.within("cpu_max"))?;
        }
        Ok(())
    }

    /// Bytes that are never taken; 0 where none are guaranteed.
    pub fn guaranteed_size(&self) -> u64 {
        self.guaranteed_size.unwrap_or(0)
    }

    /// Bytes the governor lets the guest have.
    pub fn max_size(&self, ram: u64) -> u64 {
        self.max_size.unwrap_or(ram)
    }

    /// Bytes of a step.
    pub fn step_size(&self) -> u64 {
        self.step.unwrap_or(DEFAULT_STEP.0)
    }
}

impl VmConfig {
    /// Bytes that the balloons must leave to the guest; 0 where nothing is guaranteed.
    pub fn floor_bytes(&self) -> u64 {
        let overcommit = self.overcommit.as_ref();
        overcommit.map_or(0, OvercommitConfig::guaranteed_size)
    }

    /// Bytes that the VM is promised to be able to use, which is what admission counts: the
    /// guarantee, or all RAM where there is none and so nobody who would take any.
    pub fn guaranteed_bytes(&self) -> u64 {
        let mut overcommit = self.overcommit.clone().unwrap_or_default();
        overcommit.fill_in(self.memory.size);
        overcommit.guaranteed_size.unwrap_or(self.memory.size)
    }

    /// Whether the governor drives the first balloon, or will.
    pub fn governed(&self) -> bool {
        let overcommit = self.overcommit.as_ref();
        overcommit.is_some_and(|overcommit| overcommit.mode == OvercommitMode::Auto)
    }

    /// Checks the policy against the rest of the configuration.
    pub(super) fn validate_overcommit(&self) -> Result<(), Invalid> {
        let Some(overcommit) = &self.overcommit else {
            return Ok(());
        };
        overcommit
            .validate(self.memory.size)
            .map_err(|e| e.within("overcommit"))?;
        if self.governed() && self.memory.hugepages {
            return Err(Invalid::new(
                "overcommit.mode",
                "auto has nothing to gain with `memory.hugepages`: guests give pages of 4 KiB, \
                 and only whole huge pages can be given back to the host",
            ));
        }
        Ok(())
    }

    /// Bytes all balloons together ask for.
    pub fn balloon_bytes(&self) -> u64 {
        let sizes = self.all_balloons().map(|(_, _, balloon)| balloon.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Refuses this configuration where its balloons, which asked for `before` bytes so far, now
    /// ask for more and would leave the guest less than it is guaranteed. `field` is named.
    pub fn check_floor(&self, before: u64, field: &str) -> Result<(), Error> {
        let after = self.balloon_bytes();
        let left = self.memory.size.saturating_sub(after);
        let floor = self.floor_bytes();
        if after > before && left < floor {
            return Err(Error::BelowFloor {
                field: field.to_owned(),
                left,
                floor,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<OvercommitConfig, serde_json::Error> {
        serde_json::from_str(text)
    }

    fn refused(text: &str) -> Option<String> {
        let config = parse(text).unwrap();
        config.validate(512 * MIB).err().map(|error| error.field)
    }

    #[test]
    fn what_is_not_said_has_a_sound_default() {
        let mut auto = parse(r#"{"mode": "auto"}"#).unwrap();
        auto.validate(512 * MIB).unwrap();
        auto.fill_in(512 * MIB);
        assert_eq!(auto.guaranteed_size, Some(256 * MIB));
        assert_eq!(auto.max_size, Some(512 * MIB));
        assert_eq!(auto.step, Some(512 * MIB / 20 / PAGE * PAGE));
        let mut off = parse("{}").unwrap();
        off.fill_in(512 * MIB);
        assert_eq!((off.mode, off.guaranteed_size()), (OvercommitMode::Off, 0));
        let mut small = parse(r#"{"mode": "auto"}"#).unwrap();
        small.validate(16 * MIB).unwrap();
        small.fill_in(16 * MIB);
        assert_eq!(small.guaranteed_size, Some(16 * MIB));
    }

    #[test]
    fn what_can_not_be_kept_is_refused_by_field() {
        for (text, field) in [
            (r#"{"guaranteed_size": 536870913}"#, "guaranteed_size"),
            (r#"{"guaranteed_size": 536875008}"#, "guaranteed_size"),
            (
                r#"{"guaranteed_size": 209715200, "max_size": 104857600}"#,
                "guaranteed_size",
            ),
            (
                r#"{"mode": "auto", "guaranteed_size": 4096}"#,
                "guaranteed_size",
            ),
            (r#"{"max_size": 536875008}"#, "max_size"),
            (r#"{"max_size": 100}"#, "max_size"),
            (r#"{"weight": 0}"#, "weight"),
            (r#"{"weight": 10001}"#, "weight"),
            (r#"{"buffer_percent": 0}"#, "buffer_percent"),
            (r#"{"buffer_percent": 201}"#, "buffer_percent"),
            (r#"{"step": 0}"#, "step"),
            (r#"{"step": 1048577}"#, "step"),
            (r#"{"step": 536875008}"#, "step"),
            (r#"{"interval_ms": 99}"#, "interval_ms"),
            (r#"{"host_free_percent": 0}"#, "host_free_percent"),
            (r#"{"host_free_percent": 51}"#, "host_free_percent"),
            (r#"{"cpu_weight": 0}"#, "cpu_weight"),
            (r#"{"cpu_weight": 10001}"#, "cpu_weight"),
            (r#"{"cpu_max": {"quota_us": 999}}"#, "cpu_max.quota_us"),
            (r#"{"cpu_max": {"quota_us": 0}}"#, "cpu_max.quota_us"),
            (
                r#"{"cpu_max": {"quota_us": 1000000001}}"#,
                "cpu_max.quota_us",
            ),
            (
                r#"{"cpu_max": {"quota_us": 5000, "period_us": 999}}"#,
                "cpu_max.period_us",
            ),
            (
                r#"{"cpu_max": {"quota_us": 5000, "period_us": 1000001}}"#,
                "cpu_max.period_us",
            ),
            (
                r#"{"cpu_max": {"quota_us": 5000, "burst_us": 5001}}"#,
                "cpu_max.burst_us",
            ),
        ] {
            assert_eq!(refused(text).as_deref(), Some(field), "{text}");
        }
        for text in [
            r#"{"guaranteed_size": 536870912}"#,
            r#"{"max_size": 16777216, "mode": "auto"}"#,
            r#"{"weight": 10000, "step": 1048576, "interval_ms": 60000}"#,
            r#"{"cpu_weight": 10000, "cpu_max": {"quota_us": 1000, "period_us": 1000000}}"#,
            r#"{"cpu_max": {"quota_us": 5000, "burst_us": 5000}}"#,
        ] {
            assert_eq!(refused(text), None, "{text}");
        }
    }

    #[test]
    fn a_field_that_does_not_exist_is_refused() {
        for text in [
            r#"{"guaranteed": 4096}"#,
            r#"{"mode": "automatic"}"#,
            r#"{"swap": true}"#,
        ] {
            parse(text).unwrap_err();
        }
    }

    #[test]
    fn balloons_that_grow_leave_the_guarantee() {
        let config = |balloon: u64| -> VmConfig {
            let text = format!(
                r#"{{"memory": {{"size": {}}}, "balloons": [{{"size": {balloon}}}],
                    "overcommit": {{"guaranteed_size": {}}}}}"#,
                64 * MIB,
                48 * MIB
            );
            serde_json::from_str(&text).unwrap()
        };
        config(16 * MIB).check_floor(0, "size").unwrap();
        let error = config(16 * MIB + PAGE)
            .check_floor(0, "size")
            .unwrap_err()
            .to_string();
        assert!(error.contains("50331648"), "names the floor: {error}");
        // What is below it already, by an override, may come back in steps.
        config(32 * MIB).check_floor(40 * MIB, "size").unwrap();
        let mut without = config(60 * MIB);
        without.overcommit = None;
        without.check_floor(0, "size").unwrap();
    }

    #[test]
    fn the_host_has_to_have_what_is_guaranteed_or_else_everything() {
        for (overcommit, bytes) in [
            ("null", 64),
            (r#"{"weight": 7}"#, 64),
            (r#"{"mode": "auto"}"#, 32),
            (r#"{"mode": "auto", "max_size": 50331648}"#, 24),
            (r#"{"guaranteed_size": 16777216}"#, 16),
            (r#"{"guaranteed_size": 0}"#, 0),
        ] {
            let text = format!(r#"{{"memory": {{"size": 67108864}}, "overcommit": {overcommit}}}"#);
            let config: VmConfig = serde_json::from_str(&text).unwrap();
            assert_eq!(config.guaranteed_bytes(), bytes * MIB, "{overcommit}");
        }
    }
}

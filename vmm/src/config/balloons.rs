//! Balloons: what each may be asked for beside the others.

use devices::balloon::BalloonConfig;
use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmConfig;

/// Id of the balloon in `balloon`, unless it has one.
pub const BALLOON_ID: &str = "__balloon";

/// Another size for a part of the VM; absent, or null, is what is to stay. Of a VM that is not
/// booted the configuration is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({"desired_balloon": 268435456}))]
pub struct VmResize {
    /// Number of vCPUs. It can't be changed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 64)]
    pub desired_vcpus: Option<u32>,
    /// Bytes of RAM. They can't be changed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes to ask of the guest by the first balloon: `balloon`, or else the first of `balloons`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

impl VmConfig {
    /// Every balloon with the name of its field and its id.
    pub fn all_balloons(&self) -> impl Iterator<Item = (String, &str, &BalloonConfig)> {
        let single = self.balloon.iter().map(|balloon| {
            let id = balloon.common.id.as_deref().unwrap_or(BALLOON_ID);
            ("balloon".to_owned(), id, balloon)
        });
        let several = self.balloons.iter().enumerate().map(|(index, balloon)| {
            let id = balloon.common.id.as_deref().unwrap_or_default();
            (format!("balloons[{index}]"), id, balloon)
        });
        single.chain(several)
    }

    /// The balloon `id`, to change it.
    pub fn balloon_mut(&mut self, id: &str) -> Option<&mut BalloonConfig> {
        let single = self.balloon.as_mut().filter(|balloon| {
            let its_id = balloon.common.id.as_deref();
            its_id.unwrap_or(BALLOON_ID) == id
        });
        let mut several = self.balloons.iter_mut();
        single.or_else(|| several.find(|balloon| balloon.common.id.as_deref() == Some(id)))
    }

    /// Takes the balloon `id` out; false where there is none.
    pub(super) fn remove_balloon(&mut self, id: &str) -> bool {
        if self
            .balloon
            .take_if(|balloon| balloon.common.id.as_deref().unwrap_or(BALLOON_ID) == id)
            .is_some()
        {
            return true;
        }
        let before = self.balloons.len();
        self.balloons
            .retain(|balloon| balloon.common.id.as_deref() != Some(id));
        self.balloons.len() < before
    }

    /// Checks the balloons against RAM and one another.
    pub fn validate_balloons(&self) -> Result<(), Invalid> {
        let mut total = 0_u64;
        let mut reporter: Option<String> = None;
        for (field, _, balloon) in self.all_balloons() {
            balloon.validate().map_err(|e| e.within(&field))?;
            total = total.saturating_add(balloon.size);
            let size = |reason| Err(Invalid::new(format!("{field}.size"), reason));
            if balloon.size > 0 && total >= self.memory.size {
                return size(format!(
                    "asks for {} bytes, with the balloons before it for {total}; must leave \
                     something of the {} bytes of RAM",
                    balloon.size, self.memory.size
                ));
            }
            if balloon.size > 0 && self.memory.prefault && !balloon.inflate_prefaulted {
                return size(
                    "`memory.prefault` fills memory and a balloon empties it; set \
                     `inflate_prefaulted` on the balloon if both are meant"
                        .to_owned(),
                );
            }
            let first = field == "balloon" || self.balloon.is_none() && field == "balloons[0]";
            if first && self.governed() && self.memory.prefault && !balloon.inflate_prefaulted {
                return Err(Invalid::new(
                    format!("{field}.inflate_prefaulted"),
                    "`memory.prefault` fills memory and `overcommit.mode` auto empties it; set \
                     this if both are meant",
                ));
            }
            if balloon.free_page_reporting {
                if let Some(other) = reporter {
                    return Err(Invalid::new(
                        format!("{field}.free_page_reporting"),
                        format!("{other} reports free pages already, and only one can"),
                    ));
                }
                reporter = Some(format!("`{field}`"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;

    const MIB: u64 = 1 << 20;

    fn balloon(size: u64) -> BalloonConfig {
        BalloonConfig {
            size,
            ..BalloonConfig::default()
        }
    }

    fn config(balloons: &[BalloonConfig]) -> VmConfig {
        let mut config: VmConfig = serde_json::from_str("{}").unwrap();
        config.memory = MemoryConfig {
            size: 64 * MIB,
            ..MemoryConfig::default()
        };
        config.balloons = balloons.to_vec();
        config
    }

    fn field(config: &VmConfig) -> Option<String> {
        config.validate_balloons().err().map(|error| error.field)
    }

    #[test]
    fn together_they_leave_some_ram() {
        let most = 64 * MIB - 4096;
        assert_eq!(field(&config(&[balloon(most)])), None);
        assert_eq!(
            field(&config(&[balloon(0), balloon(most), balloon(0)])),
            None
        );
        assert_eq!(
            field(&config(&[balloon(64 * MIB)])).unwrap(),
            "balloons[0].size"
        );
        let both = [balloon(32 * MIB), balloon(32 * MIB)];
        assert_eq!(field(&config(&both)).unwrap(), "balloons[1].size");
        let mut mixed = config(&[balloon(32 * MIB)]);
        mixed.balloon = Some(balloon(40 * MIB));
        assert_eq!(field(&mixed).unwrap(), "balloons[0].size");
        assert_eq!(
            field(&config(&[balloon(4097)])).unwrap(),
            "balloons[0].size"
        );
        let huge = u64::MAX / 4096 * 4096;
        assert!(field(&config(&[balloon(huge), balloon(huge)])).is_some());
    }

    #[test]
    fn one_of_them_reports_free_pages() {
        let reporter = BalloonConfig {
            free_page_reporting: true,
            ..balloon(0)
        };
        assert_eq!(field(&config(&[balloon(0), reporter.clone()])), None);
        let mut two = config(std::slice::from_ref(&reporter));
        two.balloon = Some(reporter);
        assert_eq!(field(&two).unwrap(), "balloons[0].free_page_reporting");
    }

    #[test]
    fn prefaulted_memory_is_inflated_only_if_it_is_meant() {
        let mut config = config(&[balloon(0), balloon(MIB)]);
        config.memory.prefault = true;
        assert_eq!(field(&config).unwrap(), "balloons[1].size");
        config.balloons[1].inflate_prefaulted = true;
        assert_eq!(field(&config), None);
    }

    #[test]
    fn each_is_found_by_its_id() {
        let mut config = config(&[balloon(0)]);
        config.balloons[0].common.id = Some("b".into());
        config.balloon = Some(balloon(4096));
        let ids: Vec<_> = config.all_balloons().map(|(_, id, _)| id).collect();
        assert_eq!(ids, [BALLOON_ID, "b"]);
        config.balloon_mut("b").unwrap().size = 8192;
        assert_eq!(config.balloons[0].size, 8192);
        assert!(config.balloon_mut("c").is_none());
        assert!(!config.remove_balloon("c"));
        assert!(config.remove_balloon(BALLOON_ID) && config.remove_balloon("b"));
        assert_eq!(config.all_balloons().count(), 0);
    }
}

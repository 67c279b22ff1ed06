//! The real-time clock and CMOS memory behind an index and a data port (Motorola MC146818).
//!
//! The clock is the host's, in UTC, BCD and 24 hours, and the guest can't set it: writes to its
//! registers are swallowed. There are no alarms and no periodic interrupts. The other registers
//! are memory; some hold the size of RAM, where firmware looks for it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// I/O ports of the index and the data.
pub const CMOS_PORTS: u64 = 2;

const REGISTERS: usize = 128;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32.768 kHz time base, 1024 Hz periodic rate: what every PC's firmware leaves there.
const STATUS_A_DIVIDER: u8 = 0x26;
const STATUS_A_UPDATE_IN_PROGRESS: u8 = 0x80;
const STATUS_B_24_HOURS: u8 = 0x02;
const STATUS_B_BINARY: u8 = 0x04;
const STATUS_D_VALID: u8 = 0x80;

/// The update flag rises this long before the second changes.
const UPDATE_NANOS: u32 = 244_000;

/// A real-time clock with CMOS memory.
pub struct Cmos(Mutex<State>);

struct State {
    index: u8,
    registers: [u8; REGISTERS],
}

impl Cmos {
    /// A clock in a machine with so many bytes of RAM below 4 GiB and beyond.
    pub fn new(low_ram_bytes: u64, high_ram_bytes: u64) -> Self {
        let mut registers = [0; REGISTERS];
        let mut set = |index: usize, value: u64, bytes: usize| {
            for (register, byte) in registers
                .iter_mut()
                .skip(index)
                .zip(value.to_le_bytes())
                .take(bytes)
            {
                *register = byte;
            }
        };
        let extended_kib = (low_ram_bytes >> 10).saturating_sub(1024).min(0xffff);
        set(0x15, 640, 2);
        set(0x17, extended_kib, 2);
        set(0x30, extended_kib, 2);
        let above_16_mib = low_ram_bytes.saturating_sub(16 << 20) >> 16;
        set(0x34, above_16_mib.min(0xffff), 2);
        set(0x5b, (high_ram_bytes >> 16).min(0xff_ffff), 3);
        Self(Mutex::new(State {
            index: 0,
            registers,
        }))
    }
}

impl State {
    fn read(&self) -> u8 {
        let stored = self
            .registers
            .get(usize::from(self.index))
            .copied()
            .unwrap_or(0xff);
        match self.index {
            STATUS_A => {
                if host_time().subsec_nanos() >= 1_000_000_000 - UPDATE_NANOS {
                    STATUS_A_DIVIDER | STATUS_A_UPDATE_IN_PROGRESS
                } else {
                    STATUS_A_DIVIDER
                }
            }
            // A guest that asks for binary or 12 hours reads back that it can't have them.
            STATUS_B => (stored | STATUS_B_24_HOURS) & !STATUS_B_BINARY,
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            index => time_register(host_seconds(), index).map_or(stored, bcd),
        }
    }

    fn write(&mut self, value: u8) {
        if time_register(0, self.index).is_none()
            && let Some(register) = self.registers.get_mut(usize::from(self.index))
        {
            *register = value;
        }
    }
}

/// The host's clock, UTC. Before 1970 it stands still.
fn host_time() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn host_seconds() -> i64 {
    i64::try_from(host_time().as_secs()).unwrap_or_default()
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// The value of a time-of-day register, in binary; `None` for all others.
fn time_register(seconds: i64, index: u8) -> Option<u8> {
    let of_day = seconds.rem_euclid(86_400);
    let days = seconds.div_euclid(86_400);
    let value = match index {
        0 => of_day % 60,
        2 => of_day / 60 % 60,
        4 => of_day / 3600,
        // 1 is Sunday; 1970 began on a Thursday.
        6 => (days + 4).rem_euclid(7) + 1,
        7 => date(days).2,
        8 => date(days).1,
        9 => date(days).0.rem_euclid(100),
        CENTURY => date(days).0.div_euclid(100).rem_euclid(100),
        _ => return None,
    };
    // All of them are below 100.
    Some(value as u8)
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01: the years are taken to
/// begin in March, so that the leap day is their last, in eras of 400 years.
fn date(days: i64) -> (i64, i64, i64) {
    const ERA: i64 = 146_097;
    let since_era_0 = days + 719_468;
    let era = since_era_0.div_euclid(ERA);
    let day = since_era_0.rem_euclid(ERA);
    let year = (day - day / 1460 + day / 36_524 - day / (ERA - 1)) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    (
        era * 400 + year + i64::from(month <= 2),
        month,
        day_of_month,
    )
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, byte) in (offset..CMOS_PORTS).zip(data) {
            *byte = match port {
                1 => state.read(),
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, &byte) in (offset..CMOS_PORTS).zip(data) {
            match port {
                // Bit 7 masks NMIs on a PC's board; there is nothing here to mask.
                0 => state.index = byte & 0x7f,
                _ => state.write(byte),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(cmos: &Cmos, index: u8) -> u8 {
        let mut byte = [0];
        cmos.write(0, &[index | 0x80]);
        cmos.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn dates_are_right_over_leap_years_and_centuries() {
        for (seconds, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (1_709_164_800, (2024, 2, 29)),
            (1_735_603_200, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(date(seconds / 86_400), expected);
        }
        // 2026-10-17 was to be a Saturday.
        let seconds = 1_792_195_200;
        assert_eq!(date(seconds / 86_400), (2026, 10, 17));
        assert_eq!(time_register(seconds, 6), Some(7));
    }

    #[test]
    fn the_clock_reads_as_valid_bcd_near_the_hosts_time() {
        let cmos = Cmos::new(0, 0);
        let unbcd = |value: u8| {
            assert!(value & 0xf < 10 && value >> 4 < 10, "{value:#x}");
            i64::from(value >> 4) * 10 + i64::from(value & 0xf)
        };
        let before = host_seconds();
        let [second, minute, hour, day, month, year, century] =
            [0, 2, 4, 7, 8, 9, CENTURY].map(|index| unbcd(register(&cmos, index)));
        let (y, m, d) = date(before.div_euclid(86_400));
        // Unless midnight has just passed.
        if before % 86_400 < 86_390 {
            assert_eq!((century * 100 + year, month, day), (y, m, d));
            let of_day = hour * 3600 + minute * 60 + second;
            assert!((0..=61).contains(&(of_day - before % 86_400)));
        }
        assert!((1..=7).contains(&register(&cmos, 6)));
        assert_eq!(register(&cmos, STATUS_A) & 0x7f, STATUS_A_DIVIDER);
        assert_eq!(register(&cmos, STATUS_D), STATUS_D_VALID);
    }

    #[test]
    fn the_guest_can_neither_set_the_clock_nor_change_its_format() {
        let cmos = Cmos::new(0, 0);
        cmos.write(0, &[9]);
        cmos.write(1, &[0x70]);
        assert_ne!(register(&cmos, 9), 0x70);
        cmos.write(0, &[STATUS_B]);
        cmos.write(1, &[STATUS_B_BINARY | 0x80]);
        assert_eq!(register(&cmos, STATUS_B), STATUS_B_24_HOURS | 0x80);
        cmos.write(0, &[0x40]);
        cmos.write(1, &[0x5a]);
        assert_eq!(register(&cmos, 0x40), 0x5a);
    }

    #[test]
    fn the_size_of_ram_stands_where_firmware_looks_for_it() {
        let cmos = Cmos::new(3 << 30, 2 << 30);
        let word =
            |low, high| u32::from(register(&cmos, high)) << 8 | u32::from(register(&cmos, low));
        assert_eq!(word(0x34, 0x35) << 16, (3 << 30) - (16 << 20));
        assert_eq!(word(0x5b, 0x5c) << 16, 2 << 30);
        assert_eq!(word(0x15, 0x16), 640);
        assert_eq!(word(0x17, 0x18), 0xffff);
    }
}

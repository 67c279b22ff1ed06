//! The ACPI power management timer: a 32-bit counter at 3.579545 MHz (ACPI 6.5 §4.8.3.3).

use std::time::Instant;

use crate::bus::BusDevice;

/// I/O ports of the timer.
pub const PM_TIMER_PORTS: u64 = 4;

const FREQUENCY_HZ: u128 = 3_579_545;

/// The timer; it counts the host's monotonic time, paused or not.
pub struct PmTimer {
    start: Instant,
}

impl Default for PmTimer {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl PmTimer {
    fn ticks(&self) -> u32 {
        // The counter wraps, as it should.
        (self.start.elapsed().as_nanos() * FREQUENCY_HZ / 1_000_000_000) as u32
    }
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let ticks = self.ticks().to_le_bytes();
        let from = ticks
            .iter()
            .skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (byte, tick) in data.iter_mut().zip(from) {
            *byte = *tick;
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_timer_runs_forward_at_its_frequency() {
        let timer = PmTimer::default();
        let read = || {
            let mut data = [0; 4];
            timer.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        let mut last = read();
        for _ in 0..1000 {
            let next = read();
            assert!(next >= last);
            last = next;
        }
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        let ticks = u128::from(read() - last);
        let elapsed = before.elapsed().as_micros();
        assert!(ticks >= 20_000 * FREQUENCY_HZ / 1_000_000);
        assert!(ticks <= (elapsed + 5_000) * FREQUENCY_HZ / 1_000_000 + 2);
    }
}

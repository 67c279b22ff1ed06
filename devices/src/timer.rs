//! A one-shot timer that a worker's loop can watch.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::allow;
use crate::sandbox::Allow;

/// What a thread needs to set and acknowledge a timer (beside `read`, which all workers have).
pub const SYSCALLS: &[Allow] = &[allow!(timerfd_settime)];

/// A timer. Made on the VMM thread, used on the worker's.
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Makes the descriptor readable once, `wait` (at least a nanosecond) from now; forgets any
    /// earlier setting.
    pub fn set(&self, wait: Duration) -> io::Result<()> {
        // A time of zero would switch it off.
        let wait = wait.max(Duration::from_nanos(1));
        let setting = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &setting)?;
        Ok(())
    }

    /// Makes the descriptor unreadable until the timer is set and runs out again.
    pub fn acknowledge(&self) {
        let mut expirations = [0; 8];
        // EAGAIN where it was set anew before its last end was heard of.
        let _ = rustix::io::read(&self.0, &mut expirations);
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

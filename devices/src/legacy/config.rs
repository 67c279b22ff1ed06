//! Configuration of the serial port and the debug port.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::Invalid;

/// A character device and where its bytes go on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleConfig {
    /// Where the bytes go.
    pub mode: ConsoleMode,
    /// With `File`: the file to write to. With `Pty`: filled in by `vm.create` with the path of
    /// the pseudo-terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub file: Option<PathBuf>,
    /// With `Socket`: where to listen (a Unix stream socket, one client at a time).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
}

/// Where a character device's bytes go on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ConsoleMode {
    /// There is no such device.
    Off,
    /// A pseudo-terminal made for it.
    Pty,
    /// The process's standard input and output.
    Tty,
    /// A file; output only.
    File,
    /// A Unix socket to listen on.
    Socket,
    /// The device is there; its output is thrown away.
    #[default]
    Null,
}

/// The debug port: bytes the guest writes to it go where the mode says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DebugConsoleConfig {
    /// Where the bytes go; `Socket` is not possible.
    pub mode: ConsoleMode,
    /// With `File`: the file to write to. With `Pty`: the pseudo-terminal, filled in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub file: Option<PathBuf>,
    /// The I/O port; 0xe9 when absent.
    #[serde(default = "debug_port", deserialize_with = "null_is_debug_port")]
    #[schema(value_type = Option<u16>, maximum = 65535)]
    pub iobase: u16,
}

fn debug_port() -> u16 {
    0xe9
}

fn null_is_debug_port<'de, D: serde::Deserializer<'de>>(d: D) -> Result<u16, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_else(debug_port))
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Off,
            file: None,
            iobase: debug_port(),
        }
    }
}

impl ConsoleConfig {
    /// Checks that the mode has what it needs.
    pub fn validate(&self) -> Result<(), Invalid> {
        match self.mode {
            ConsoleMode::File if self.file.is_none() => {
                Err(Invalid::new("file", "mode `File` needs one"))
            }
            ConsoleMode::Socket if self.socket.is_none() => {
                Err(Invalid::new("socket", "mode `Socket` needs one"))
            }
            _ => Ok(()),
        }
    }
}

impl DebugConsoleConfig {
    /// Checks that the mode has what it needs and that the port is free.
    pub fn validate(&self) -> Result<(), Invalid> {
        match self.mode {
            ConsoleMode::File if self.file.is_none() => {
                Err(Invalid::new("file", "mode `File` needs one"))
            }
            ConsoleMode::Socket => Err(Invalid::new("mode", "the debug port can't be a socket")),
            _ => Ok(()),
        }
    }
}

//! The HTTP API of ballast, its OpenAPI document, the command line and the process around them.
//!
//! This crate holds no VM state: a request becomes a command to the VMM thread, or reads what that
//! thread has published. Everything here runs on the main thread, which has a seccomp filter of
//! its own from before the first request on.

pub mod body;
pub mod cli;
pub mod compat;
pub mod disk;
pub mod error;
pub mod event_monitor;
pub mod host;
pub mod json;
pub mod log;
pub mod metrics;
pub mod openapi;
pub mod process;
pub mod raw;
pub mod routes;
pub mod sandbox;
pub mod server;
pub mod socket;

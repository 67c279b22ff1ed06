//! Helpers to read and write a device-specific configuration space of any width at any offset.

//! The event devices that the ACPI tables point at: Generic Event Device, sleep and reset.

//! ACPI PCI hotplug registers.

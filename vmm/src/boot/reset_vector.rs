//! What stands where a PC has its firmware's first instruction: F000:FFF0 in real mode.
//!
//! There is no firmware here, yet kernels jump there to restart the machine. Linux does so by
//! default on machines with hardware-reduced ACPI (ACPI 6.5 §3.11.1): it expects EFI there, and
//! where it finds none, it has the BIOS do it and tries nothing else before. So the instruction
//! is one that resets the machine, by the keyboard controller.

use devices::guest_memory::GuestRam;
use vm_memory::Bytes;

use crate::error::Error;
use crate::layout::RESET_VECTOR;

/// 16-bit code; it ends before the first MiB does.
const CODE: [u8; 7] = [
    0xb0, 0xfe, // mov al, 0xfe    pulse the reset line
    0xe6, 0x64, // out 0x64, al
    0xf4, // 1: hlt
    0xeb, 0xfd, // jmp 1b
];

/// Writes the code into guest memory. Called on the VMM thread for each boot.
pub fn write(ram: &GuestRam) -> Result<(), Error> {
    ram.write_slice(&CODE, RESET_VECTOR)
        .map_err(|e| Error::host("writing the reset vector", e))
}

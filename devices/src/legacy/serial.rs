//! The first serial port: a 16550A UART at eight I/O ports (National Semiconductor PC16550D).
//!
//! The registers are `vm-superio`'s. Each byte of a wide access goes to the next register, as an
//! ISA bus splits it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::{ConsoleBackend, InputPort, Shared};
use crate::bus::BusDevice;

/// I/O ports that a [`SerialDevice`] takes.
pub const SERIAL_PORTS: u64 = 8;

/// Interrupt enable register; bit 0: received data.
const IER: u8 = 1;
/// Interrupt identification register.
const IIR: u8 = 2;
/// Line control register; bit 7 puts the divisor in the place of data and IER.
const LCR: u8 = 3;
/// Modem control register, whose bit 4 is the loopback mode in which no input is taken.
const MCR: u64 = 4;
/// Line status register; bit 0: there is data.
const LSR: u8 = 5;
/// What IIR says of received data in a UART with its FIFOs on (PC16550D, table 4).
const RECEIVED_DATA: u8 = 0xc4;

/// A UART attached to a [`ConsoleBackend`]; made anew for each boot.
pub struct SerialDevice {
    uart: Mutex<Serial<Irq, Drained, Output>>,
    input: Arc<Waiting>,
}

/// The console thread has bytes that did not fit; both sides change this under the UART's lock.
struct Waiting {
    for_room: AtomicBool,
    shared: Arc<Shared>,
}

impl Waiting {
    fn ask(&self) {
        if self.for_room.swap(false, Ordering::Relaxed) {
            self.shared.wake();
        }
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Drained(Arc<Waiting>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.ask();
    }
}

struct Output(Arc<Shared>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialDevice {
    /// A UART after power-on that writes to `backend` and, from now on, gets its input;
    /// `interrupt` raises COM1's line (edge). Called on the VMM thread for each boot.
    pub fn attach(backend: &ConsoleBackend, interrupt: EventFd) -> Arc<Self> {
        let shared = backend.shared();
        let input = Arc::new(Waiting {
            for_room: AtomicBool::new(false),
            shared: shared.clone(),
        });
        let uart = Serial::with_events(
            Irq(interrupt),
            Drained(input.clone()),
            Output(shared.clone()),
        );
        let device = Arc::new(Self {
            uart: Mutex::new(uart),
            input,
        });
        let port: Arc<dyn InputPort> = device.clone();
        shared.attach(Arc::downgrade(&port));
        device
    }
}

/// Received data is announced for as long as there is some: only reading it takes that back
/// (PC16550D, section 8.5). `vm-superio` forgets it when IIR is read, after which a driver that
/// takes so many bytes an interrupt and no more, as Linux's does with 256, leaves the rest there
/// for ever, and everything behind it with the host.
fn has_data_to_announce(uart: &mut Serial<Irq, Drained, Output>) -> bool {
    // None of the three changes by being read.
    uart.read(LSR) & 1 != 0 && uart.read(LCR) & 0x80 == 0 && uart.read(IER) & 1 != 0
}

impl InputPort for SerialDevice {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        let room = uart.fifo_capacity().min(bytes.len());
        // In loopback mode it takes none. An error means that the interrupt could not be raised
        // (the eventfd's counter is full, so it is raised already): the bytes are in.
        let taken = match bytes.get(..room) {
            Some(fitting) if room > 0 => uart.enqueue_raw_bytes(fitting).unwrap_or(room),
            _ => 0,
        };
        self.input
            .for_room
            .store(taken < bytes.len(), Ordering::Relaxed);
        taken
    }
}

impl BusDevice for SerialDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..SERIAL_PORTS).zip(data) {
            *byte = match register as u8 {
                IIR if has_data_to_announce(&mut uart) => RECEIVED_DATA,
                register => uart.read(register),
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..SERIAL_PORTS).zip(data) {
            // Output can't fail, and an interrupt that can't be raised is raised already.
            let _ = uart.write(register as u8, *byte);
            if register == MCR {
                self.input.ask();
            }
        }
    }
}

//! The virtio-mmio transport (virtio 1.2 section 4.2, version 2 of its registers).
//!
//! It holds what every virtio device has: the status register's state machine, feature negotiation,
//! the split queues and the interrupt. The device behind it is a [`VirtioDevice`]. Requests are
//! served in the access that announces them, on the vCPU that makes it, until none is left that the
//! device has a use for, or the machine's [`Brake`] is pulled. A condemned machine's device raises no
//! interrupt any more.
//!
//! A driver that breaks a rule harms only itself: a register write out of order is ignored, a queue
//! whose rings cannot be followed sets DEVICE_NEEDS_RESET (section 2.1.2).

use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;

use crate::device::{Device, DeviceError, Effect, InterruptLine};
use crate::section::{SavedState, Section};
use crate::virtio::queue_pass::{PassEnd, Server, serve_available};
use crate::virtio::saved_queue::SavedQueue;
use crate::virtio::{Chain, VirtioDevice};
use crate::{Brake, GuestMemory};

/// "virt", what MagicValue reads as.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");

/// Version of the register layout.
const LAYOUT_VERSION: u32 = 2;

/// What VendorID reads as.
const VENDOR: u32 = u32::from_le_bytes(*b"FKVM");

/// What the transport offers for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Status bits that a driver sets, each only after all of those before it.
const STEPS: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// A virtio device of kind `D` behind memory-mapped registers.
pub struct MmioTransport<D: VirtioDevice> {
    name: String,
    model: D,
    memory: GuestMemory,
    interrupt: Arc<dyn InterruptLine>,
    brake: Brake,
    registers: Registers,
    queues: Vec<Queue>,
    /// The driver broke a queue before; that was said once. A guest can do it as often as it likes.
    said_broken: bool,
}

/// What the driver's register writes have left.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Registers {
    status: u32,
    interrupt_status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl Registers {
    fn has(&self, status_bit: u32) -> bool {
        self.status & status_bit != 0
    }
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// A device after reset, named `name` (such as `blk0`), that leaves requests in its queues
    /// while `brake`, the one of its machine, is pulled.
    pub fn new(
        name: String,
        model: D,
        memory: GuestMemory,
        interrupt: Arc<dyn InterruptLine>,
        brake: Brake,
    ) -> MmioTransport<D> {
        let queues = model
            .queue_sizes()
            .iter()
            .map(|&size| Queue::new(size).expect("queue sizes of a model are powers of two"))
            .collect();
        MmioTransport {
            name,
            model,
            memory,
            interrupt,
            brake,
            registers: Registers::default(),
            queues,
            said_broken: false,
        }
    }

    /// The device behind the registers.
    pub fn model(&self) -> &D {
        &self.model
    }

    /// The device behind the registers.
    pub fn model_mut(&mut self) -> &mut D {
        &mut self.model
    }

    fn offered(&self) -> u64 {
        self.model.features() | TRANSPORT_FEATURES
    }

    /// Whether `accepted` is what a driver of a modern device may accept (section 6.1).
    fn acceptable(&self, accepted: u64) -> bool {
        accepted & !self.offered() == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.registers.queue_sel as usize)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let registers = &self.registers;
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => LAYOUT_VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.model.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), registers.device_features_sel),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected()
                .map_or(0, |queue| u32::from(queue.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                self.selected().map_or(0, |queue| u32::from(queue.ready()))
            }
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => registers.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => registers.status,
            // Section 4.2.2.1: a shared memory region that does not exist has the length -1.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.serve_notified(value as usize),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.registers.interrupt_status &= !value,
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        let registers = &mut self.registers;
        if registers.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            tracing::debug!(
                device = self.name,
                "features are negotiated already; write ignored"
            );
            return;
        }
        let (keep, shift) = match registers.driver_features_sel {
            0 => (0xffff_ffff_0000_0000, 0),
            1 => (0x0000_0000_ffff_ffff, 32),
            // No bit of 64 and above is offered, so there is nothing to accept.
            _ => return,
        };
        registers.driver_features = registers.driver_features & keep | u64::from(value) << shift;
    }

    /// Section 2.1: bits are only added, in their order, and 0 resets.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if self.registers.status & !value & !VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
            tracing::debug!(
                device = self.name,
                value,
                "a status bit cannot be taken back"
            );
            return;
        }
        self.registers.status |= value & VIRTIO_CONFIG_S_FAILED;
        for step in STEPS {
            if self.registers.has(step) {
                continue;
            }
            if value & step == 0 {
                break;
            }
            if step == VIRTIO_CONFIG_S_FEATURES_OK && !self.settle_features() {
                break;
            }
            self.registers.status |= step;
        }
    }

    /// The negotiation's end: whether the device can work with what the driver accepted.
    fn settle_features(&mut self) -> bool {
        let accepted = self.registers.driver_features;
        if !self.acceptable(accepted) {
            let offered = self.offered();
            tracing::debug!(
                device = self.name,
                accepted,
                offered,
                "features are refused"
            );
            return false;
        }
        let event_idx = accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
        true
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
        self.queues.iter_mut().for_each(Queue::reset);
        self.model.reset();
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        let features_ok = self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK);
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else {
            return;
        };
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            return self.write_queue_ready(value);
        }
        if !features_ok || queue.ready() {
            tracing::debug!(
                device = self.name,
                offset,
                "queue register written at a wrong time"
            );
            return;
        }
        let low = |old: u64| GuestAddress(old & !0xffff_ffff | u64::from(value));
        let high = |old: u64| GuestAddress(old & 0xffff_ffff | u64::from(value) << 32);
        let taken = match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => u16::try_from(value)
                .map_or(Err(virtio_queue::Error::InvalidSize), |size| {
                    queue.try_set_size(size)
                }),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                queue.try_set_desc_table_address(low(queue.desc_table()))
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.try_set_desc_table_address(high(queue.desc_table()))
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                queue.try_set_avail_ring_address(low(queue.avail_ring()))
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.try_set_avail_ring_address(high(queue.avail_ring()))
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                queue.try_set_used_ring_address(low(queue.used_ring()))
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                queue.try_set_used_ring_address(high(queue.used_ring()))
            }
            _ => Ok(()),
        };
        if let Err(error) = taken {
            tracing::debug!(device = self.name, offset, value, %error, "queue register refused");
        }
    }

    /// A queue becomes ready only with rings that lie in RAM; 0 puts it back to reset.
    fn write_queue_ready(&mut self, value: u32) {
        let features_ok = self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK);
        let event_idx = self.registers.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else {
            return;
        };
        match value {
            0 => {
                queue.reset();
                queue.set_event_idx(features_ok && event_idx);
            }
            1 if features_ok && !queue.ready() => {
                queue.set_ready(true);
                if !usable(queue, &self.memory) {
                    queue.set_ready(false);
                    tracing::debug!(
                        device = self.name,
                        "a queue without rings in RAM is refused"
                    );
                }
            }
            _ => {}
        }
    }

    /// Serves what the queues hold, after something outside of the guest has given the device a use for
    /// it. For a thread that is no vCPU's: while the machine stands still it does nothing, and what is
    /// left is served when the vCPUs run again.
    pub fn serve_from_outside(&mut self) {
        loop {
            if let Some(_work) = self.brake.try_work() {
                return self.serve_all();
            }
            if self.brake.leave_over() {
                return;
            }
        }
    }

    /// The driver says that there are requests in queue `index`. What they do to the device may give it
    /// a use for requests of the others.
    fn serve_notified(&mut self, index: usize) {
        if self.serve(index) && self.queues.len() > 1 {
            self.serve_all();
        }
    }

    /// Serves all queues, until the device has no use any more for what any of them holds.
    fn serve_all(&mut self) {
        let mut again = true;
        while again {
            again = false;
            for index in 0..self.queues.len() {
                if self.queues[index].ready() && self.model.takes(index) {
                    again |= self.serve(index);
                }
            }
            again &= self.queues.len() > 1;
        }
    }

    /// Serves what queue `index` holds, if the device is running, and says whether that was anything.
    /// While requests keep coming only the brake ends it; the driver hears of what is done after each
    /// pass.
    fn serve(&mut self, index: usize) -> bool {
        let mut served = false;
        loop {
            let running = self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK)
                && !self.registers.has(VIRTIO_CONFIG_S_NEEDS_RESET);
            let Some(queue) = self
                .queues
                .get_mut(index)
                .filter(|queue| running && queue.ready())
            else {
                tracing::debug!(
                    device = self.name,
                    index,
                    "notification without a running queue"
                );
                return false;
            };
            let mut server = ModelQueue {
                model: &mut self.model,
                index,
                features: self.registers.driver_features,
                memory: &self.memory,
                brake: &self.brake,
            };
            let pass = match serve_available(queue, &self.memory, &self.brake, &mut server) {
                Ok(pass) => pass,
                Err(error) => {
                    self.queue_broken(index, &error);
                    return false;
                }
            };
            served |= pass.returned > 0;
            if pass.interrupt {
                self.raise(reg::VIRTIO_MMIO_INT_VRING);
            }
            match pass.end {
                PassEnd::Condemned => return false,
                PassEnd::Drained => return served,
                PassEnd::Braked if self.brake.leave_over() => return false,
                PassEnd::Bound | PassEnd::Braked => {}
            }
        }
    }

    /// The driver broke queue `index`, which cannot be followed any more.
    fn queue_broken(&mut self, index: usize, error: &virtio_queue::Error) {
        if std::mem::replace(&mut self.said_broken, true) {
            tracing::debug!(device = self.name, index, %error, "the driver broke its queue again");
        } else {
            tracing::warn!(device = self.name, index, %error, "the driver broke its queue");
        }
        self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
    }

    /// Sets a bit of InterruptStatus and raises the line, also when the bit is set already: the
    /// line is an edge, and the driver may have read the status just before.
    fn raise(&mut self, cause: u32) {
        self.registers.interrupt_status |= cause;
        if let Err(error) = self.interrupt.pulse() {
            tracing::warn!(device = self.name, %error, "the interrupt could not be raised");
        }
    }

    fn inconsistent(&self, what: impl Into<String>) -> DeviceError {
        DeviceError::Inconsistent {
            device: self.name.clone(),
            what: what.into(),
        }
    }

    fn section_name(&self) -> String {
        format!("dev/{}", self.name)
    }

    /// The queues of a saved state, if the guest could have set them up here.
    fn restored_queues(&self, saved: &[SavedQueue]) -> Result<Vec<Queue>, DeviceError> {
        if saved.len() != self.queues.len() {
            return Err(self.inconsistent(format!(
                "it has {} queues, this device has {}",
                saved.len(),
                self.queues.len()
            )));
        }
        let mut queues = Vec::with_capacity(saved.len());
        for (index, (saved, own)) in saved.iter().zip(&self.queues).enumerate() {
            let state = QueueState::from(*saved);
            let queue = Queue::try_from(state)
                .map_err(|error| self.inconsistent(format!("queue {index}: {error}")))?;
            if queue.max_size() != own.max_size() {
                return Err(self.inconsistent(format!("queue {index} has another maximal size")));
            }
            if queue.ready() && !usable(&queue, &self.memory) {
                return Err(self.inconsistent(format!("queue {index} lies outside of RAM")));
            }
            queues.push(queue);
        }
        Ok(queues)
    }
}

impl<D: VirtioDevice> Device for MmioTransport<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            return self.model.read_config(offset, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(register) => *register = self.read_register(offset as u32).to_le_bytes(),
            // Section 4.2.2.2: registers are accessed by aligned 32-bit reads and writes only.
            Err(_) => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset < u64::from(reg::VIRTIO_MMIO_CONFIG)
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset as u32, u32::from_le_bytes(value));
        }
        Effect::None
    }

    fn save(&self) -> Result<Section, DeviceError> {
        let queues = self
            .queues
            .iter()
            .map(|queue| SavedQueue::from(queue.state()))
            .collect();
        let saved = SavedTransport {
            device_type: self.model.device_type(),
            registers: self.registers,
            queues,
            model: self.model.save(),
        };
        Ok(Section::encode(self.section_name(), &saved)?)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: SavedTransport<D::State> = section.decode()?;
        if saved.device_type != self.model.device_type() {
            return Err(self.inconsistent(format!(
                "it is a virtio device of type {}, not {}",
                saved.device_type,
                self.model.device_type()
            )));
        }
        let registers = saved.registers;
        if registers.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.acceptable(registers.driver_features)
        {
            return Err(self.inconsistent(format!(
                "its driver accepted the features {:#x}, this device offers {:#x}",
                registers.driver_features,
                self.offered()
            )));
        }
        let queues = self.restored_queues(&saved.queues)?;
        self.model
            .restore(saved.model)
            .map_err(|what| self.inconsistent(what))?;
        self.registers = registers;
        self.queues = queues;
        Ok(())
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        if self.brake.condemned() {
            return Ok(());
        }
        if self.registers.interrupt_status != 0 {
            self.interrupt
                .pulse()
                .map_err(|source| DeviceError::Interrupt {
                    device: self.name.clone(),
                    source,
                })?;
        }
        if self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.serve_all();
        }
        Ok(())
    }
}

/// The model, as a pass over one of its queues sees it.
struct ModelQueue<'a, D> {
    model: &'a mut D,
    index: usize,
    features: u64,
    memory: &'a GuestMemory,
    brake: &'a Brake,
}

impl<D: VirtioDevice> Server for ModelQueue<'_, D> {
    fn takes(&self) -> bool {
        self.model.takes(self.index)
    }

    fn serve(&mut self, request: Chain) -> u32 {
        let (features, memory, brake) = (self.features, self.memory, self.brake);
        self.model
            .serve(self.index, request, features, memory, brake)
    }
}

/// One 32-bit half of a feature word; halves beyond the second are zero.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Whether a ready queue can be walked: virtio-queue takes an avail ring at 0 for none.
fn usable(queue: &Queue, memory: &GuestMemory) -> bool {
    queue.avail_ring() != 0 && queue.is_valid(memory)
}

/// A virtio device's state: the transport's part and the device's own.
#[derive(Serialize, Deserialize)]
struct SavedTransport<S> {
    device_type: u32,
    registers: Registers,
    queues: Vec<SavedQueue>,
    model: S,
}

impl<S: Serialize + DeserializeOwned> SavedState for SavedTransport<S> {
    const VERSION: u16 = 1;
}

//! What a guest and its host may rely on from the device models. No KVM is needed.

mod block_layers;
mod brake;
mod bus;
mod commit;
mod device_kit;
mod doorbell;
mod driver;
mod missing_pages;
mod overlay_model;
mod raw_disks;
mod ring;
mod serial_and_exit;
mod virtio_blk;
mod virtio_blk_hostile;
mod virtio_console;
mod virtio_mmio;
mod virtio_rng;
mod virtio_vsock;
mod vsock_guest;

//! The brake: what lets a machine stand still although its guest keeps a device busy.

use std::thread;
use std::time::Duration;

use forkvm_devices::virtio::{Chain, VirtioDevice};
use forkvm_devices::{Brake, Device, GuestMemory};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{AVAIL, DATA, Driver, EVENT_IDX, QUEUE_SIZE, USED, VERSION_1, readable};

/// A device whose guest has another vCPU: with every request that is served, one more is there.
struct Flooded {
    /// Requests until the guest stops by itself, so that a failing test ends.
    more: u32,
    served: u32,
    /// Pulled with the request of this number.
    brake: Brake,
    pull_at: u32,
}

impl Flooded {
    fn new(more: u32) -> Flooded {
        Flooded {
            more,
            served: 0,
            brake: Brake::default(),
            pull_at: u32::MAX,
        }
    }
}

impl VirtioDevice for Flooded {
    type State = ();

    fn device_type(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn serve(
        &mut self,
        _queue: usize,
        _chain: Chain,
        _features: u64,
        ram: &GuestMemory,
        _brake: &Brake,
    ) -> u32 {
        self.served += 1;
        if self.served == self.pull_at {
            self.brake.pull();
        }
        if self.more > 0 {
            self.more -= 1;
            // All slots of the ring name descriptor 0.
            let index: u16 = ram.read_obj(GuestAddress(AVAIL + 2)).unwrap();
            ram.write_obj(index.wrapping_add(1), GuestAddress(AVAIL + 2))
                .unwrap();
        }
        0
    }

    fn save(&self) {}

    fn restore(&mut self, (): ()) -> Result<(), String> {
        Ok(())
    }
}

/// A driver of [`Flooded`] that has the brake pulled with request `pull_at`.
fn flooded(more: u32, pull_at: u32, features: u64) -> Driver<Flooded> {
    let mut driver = Driver::running(Flooded::new(more), VERSION_1 | features);
    let brake = driver.brake.clone();
    let model = driver.device.model_mut();
    (model.brake, model.pull_at) = (brake, pull_at);
    driver
}

fn served(driver: &Driver<Flooded>) -> u32 {
    driver.device.model().served
}

#[test]
fn requests_that_keep_coming_are_all_served_and_the_driver_hears_of_them_meanwhile() {
    for features in [0, EVENT_IDX] {
        let mut driver = flooded(99, u32::MAX, features);
        driver.offer_chain(&[readable(DATA, 1)]);
        driver.notify();
        assert_eq!(driver.used(), 100);
        assert!(!driver.brake.take_left_over());
        if features == 0 {
            assert_eq!(driver.line.edges(), 100_usize.div_ceil(QUEUE_SIZE.into()));
        }
    }
}

#[test]
fn a_pulled_brake_ends_a_pass_between_two_requests() {
    let mut driver = flooded(1_000_000, 40, 0);
    driver.offer_chain(&[readable(DATA, 1)]);
    driver.notify();
    assert_eq!((served(&driver), driver.used()), (40, 40));
    assert!(
        driver.line.edges() > 0,
        "the driver is told of what is done"
    );
}

#[test]
fn what_the_brake_left_over_is_served_by_activate_once_it_is_released() {
    for features in [0, EVENT_IDX] {
        let mut driver = flooded(99, 40, features);
        driver.offer_chain(&[readable(DATA, 1)]);
        driver.notify();
        assert!(
            !driver.brake.take_left_over(),
            "not yet: the machine is to stand still"
        );
        driver.device.activate().unwrap();
        assert_eq!(driver.used(), 40, "while it is pulled nothing is served");

        driver.brake.release();
        assert!(driver.brake.take_left_over());
        assert!(!driver.brake.take_left_over(), "said once");
        driver.device.activate().unwrap();
        assert_eq!(driver.used(), 100);
        assert!(!driver.brake.take_left_over());
    }
}

#[test]
fn a_notification_while_the_brake_is_pulled_is_not_lost() {
    let mut driver = flooded(0, u32::MAX, 0);
    driver.brake.pull();
    driver.offer_chain(&[readable(DATA, 1)]);
    driver.notify();
    assert_eq!(driver.used(), 0);
    driver.brake.release();
    assert!(driver.brake.take_left_over());
    driver.device.activate().unwrap();
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_driver_with_event_idx_is_asked_for_the_next_notification_however_a_pass_ended() {
    // 16 and 32 requests end a pass by its bound, 40 by the brake.
    for total in [1, 15, 16, 17, 32, 40] {
        let mut driver = flooded(total - 1, 40, EVENT_IDX);
        driver.offer_chain(&[readable(DATA, 1)]);
        driver.notify();
        let avail_event = USED + 4 + 8 * u64::from(QUEUE_SIZE);
        let event: u16 = driver.memory.read_obj(GuestAddress(avail_event)).unwrap();
        assert_eq!(u32::from(event), total, "the request after the last");
    }
}

#[test]
fn work_that_is_under_way_holds_a_pause_up_until_its_deadline() {
    let brake = Brake::default();
    let work = brake.try_work().unwrap();
    brake.pull();
    assert!(brake.try_work().is_none());
    assert!(brake.until_still(Duration::from_millis(10)).is_err());
    let waiting = thread::spawn({
        let brake = brake.clone();
        move || brake.until_still(Duration::from_secs(20))
    });
    drop(work);
    waiting.join().unwrap().unwrap();
    brake.release();
    assert!(brake.try_work().is_some());
    brake.condemn();
    assert!(brake.try_work().is_none());
}

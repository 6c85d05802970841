//! When a VM passed the five end points of a clone's start.

use std::time::Instant;

/// Instants of one VM's life. Publications stop the clock at five different places; here they stand
/// apart, and whoever reports subtracts the start that is meant: the fork's request, or the spawn's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timeline {
    /// The fork was asked for: for a guest's call, when its exit was seen.
    pub fork_requested: Option<Instant>,
    /// It was asked for: by a call for its fork point, or as the fork point that its fork made was there.
    pub spawn_requested: Option<Instant>,
    /// The VM object exists.
    pub built: Option<Instant>,
    /// State and memory are in place.
    pub restored: Option<Instant>,
    /// The first KVM_RUN was entered.
    pub first_run: Option<Instant>,
    /// The first doorbell exit of the guest was seen.
    pub first_action: Option<Instant>,
    /// The guest's program reported its first answer.
    pub first_answer: Option<Instant>,
}

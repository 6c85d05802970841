//! What a build tells whoever waits for it, and how it is stopped.

/// What a build is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Another process builds in the same cache; this one waits for it.
    Waiting,
    /// The kernel's source is unpacked; counted in bytes of the archive.
    Unpacking,
    /// The kernel's configuration is made; not counted.
    Configuring,
    /// The kernel is compiled; counted in files, whose number is an estimate of the recipe.
    Compiling,
    /// The initramfs is put together, and everything moved to its place; not counted.
    Packing,
}

impl Step {
    /// For people, such as "compiling the kernel".
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Waiting => "waiting for another build",
            Step::Unpacking => "unpacking the kernel's source",
            Step::Configuring => "configuring the kernel",
            Step::Compiling => "compiling the kernel",
            Step::Packing => "packing the image",
        }
    }
}

/// Follows a build. It is called several times a second, from the thread that builds.
pub trait Watch {
    /// `done` of `total` are behind; both are 0 where nothing is counted.
    fn at(&mut self, step: Step, done: u64, total: u64);

    /// Whether to give up. The build then ends what it started and removes what it made.
    fn stop(&self) -> bool {
        false
    }
}

/// Nobody looks.
impl Watch for () {
    fn at(&mut self, _step: Step, _done: u64, _total: u64) {}
}

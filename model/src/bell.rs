//! The bell of the engine (`engine/src/bell.rs`) without a descriptor.

use std::{fmt, io, sync::Arc};

use crate::{
    planted::{Bug, planted},
    ring::Kernel,
};

pub(crate) struct Bell {
    kernel: Arc<Kernel>,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        Ok(Bell {
            kernel: Arc::default(),
        })
    }

    /// What a ring is made on.
    pub(crate) fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    pub(crate) fn ring(&self) {
        if !planted(Bug::NotRung) {
            self.kernel.ring();
        }
    }
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bell")
    }
}

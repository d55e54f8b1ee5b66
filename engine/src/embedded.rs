//! The API for programs that embed the engine: blocking calls, callbacks, or polling with an eventfd, from any thread.

/// The edge that embedding calls share.
#[derive(Debug)]
pub struct Embedded {}

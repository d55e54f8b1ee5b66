//! A program that touches memory that is not its own, in the way that its argument names; without one it does not.
//! `cargo xtask memcheck` builds it as it builds the tests, and has to see it reported.

use std::{env, hint::black_box};

const BYTES: usize = 4096;

fn main() {
    let kind = env::args().nth(1);
    let at = Box::into_raw(vec![1u8; BYTES].into_boxed_slice()).cast::<u8>();
    let free = || {
        let block = std::ptr::slice_from_raw_parts_mut(at, BYTES);
        // SAFETY: it came from a box, and is given back once.
        drop(unsafe { Box::from_raw(block) });
    };
    let read = match kind.as_deref() {
        Some("heap-use-after-free") => {
            free();
            // SAFETY: none, and that is to be found.
            unsafe { black_box(at).read() }
        }
        Some("heap-buffer-overflow") => {
            // SAFETY: none, and that is to be found.
            let read = unsafe { black_box(at).wrapping_add(BYTES).read() };
            free();
            read
        }
        _ => {
            // SAFETY: the block is there.
            let read = unsafe { black_box(at).read() };
            free();
            read
        }
    };
    println!("read {read}");
}

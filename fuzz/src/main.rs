//! libFuzzer over one target, which `PELTON_FUZZ_TARGET` names. Built and started by `cargo xtask fuzz` alone, with
//! coverage instrumentation.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("PELTON_FUZZ_TARGET").unwrap_or_default();
        let target = pelton_fuzz::target(&name).unwrap_or_else(|| panic!("there is no target {name:?}"));
        TARGET.set(target.run).expect("the engine begins once");
    },
    |data: &[u8]| TARGET.get().expect("the engine has begun")(data)
);

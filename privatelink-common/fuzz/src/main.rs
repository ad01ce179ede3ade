//! The fuzzer of one target, which the environment names; `cargo xtask fuzz` builds and runs it.
#![no_main]

use std::sync::LazyLock;

/// Writes what the target begins with to where the environment says.
fn plant() {
    let Some(dir) = std::env::var_os("PRIVATELINK_FUZZ_SEEDS").map(std::path::PathBuf::from) else { return };
    let name = std::env::var("PRIVATELINK_FUZZ").unwrap_or_default();
    for (number, seed) in privatelink_fuzz::seeds(&name).into_iter().enumerate() {
        // Without it, the fuzzer has more to find.
        let _ = std::fs::write(dir.join(format!("seed-{number}")), seed);
    }
}

static TARGET: LazyLock<privatelink_fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("PRIVATELINK_FUZZ").unwrap_or_default();
    privatelink_fuzz::target(&name).unwrap_or_else(|| panic!("PRIVATELINK_FUZZ names no target: \"{name}\""))
});

libfuzzer_sys::fuzz_target!(init: plant(), |input: &[u8]| {
    (TARGET)(input);
});

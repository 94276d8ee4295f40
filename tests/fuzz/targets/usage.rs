#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| inference_proxy_fuzz::checks::usage::check(input));

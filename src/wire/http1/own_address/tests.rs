use proptest::prelude::*;

use super::*;

fn own(addr: &str, base_path: &str) -> OwnAddress {
    OwnAddress::new(addr.parse().unwrap(), ["vllm-1", "0123456789ab"], base_path)
}

fn concealed(own: &OwnAddress, name: &str, value: &str) -> String {
    match own.conceal(name.as_bytes(), value.as_bytes()) {
        Concealed::AsIs => value.to_owned(),
        Concealed::Changed(to) => {
            assert_ne!(to, value.as_bytes(), "it has not changed");
            String::from_utf8(to).unwrap()
        }
        Concealed::Dropped => "dropped".to_owned(),
    }
}

#[test]
fn every_spelling_of_the_address_becomes_a_place_here() {
    let own = own("10.0.0.1:8000", "/api/v1");
    for spelling in [
        "http://10.0.0.1:8000",
        "https://10.0.0.1:8000",
        "HTTPS://10.0.0.1:8000",
        "ws://10.0.0.1:8000",
        "wss://10.0.0.1:8000",
        "//10.0.0.1:8000",
        "http://10.0.0.1",
        "https://10.0.0.1",
        "//10.0.0.1",
        "http://10.0.0.1:80",
        "https://10.0.0.1:443",
        "http://10.0.0.1:",
        "http://10.0.0.1:08000",
        "http://10.0.0.1.:8000",
        "http://user@10.0.0.1:8000",
        "http://user:p%40ss@10.0.0.1:8000",
        "http://a@b@10.0.0.1:8000",
        "http://10%2E0.0%2e1:8000",
        "http://10.0.0.1%3A8000",
        "http%3A%2F%2F10.0.0.1%3A8000",
        "http:%252F%252F10.0.0.1:8000",
        "http://0x0a000001:8000",
        "http://0X0A.0.0.0x1:8000",
        "http://167772161:8000",
        "http://012.0.0.01:8000",
        "http://10.1:8000",
        "http://10.0.1:8000",
        "http://[::ffff:10.0.0.1]:8000",
        "http://[::FFFF:0a00:0001]:8000",
        "http:/10.0.0.1:8000",
        "http:10.0.0.1:8000",
        "http:///10.0.0.1:8000",
        "http:\\\\10.0.0.1:8000",
        "/\\10.0.0.1:8000",
        "ht\ttp://10.0\t.0.1:8000",
        "/\t/10.0.0.1",
        "http://vllm-1:8000",
        "https://VLLM-1",
        "//vllm-1.:8000",
        "http://0123456789ab:8000",
        "http://localhost:8000",
        "http://127.0.0.1:8000",
        "http://0.0.0.0:8000",
        "http://[::1]:8000",
        "http://[::]:8000",
    ] {
        for (path, place) in [
            ("/docs?x=1#y", "/docs?x=1#y"),
            ("/api/v1/models/?x", "/v1/models/?x"),
            ("/api/v1", "/v1"),
            ("/api/v1?x", "/v1?x"),
            ("/api/v1beta", "/api/v1beta"),
            ("", "/"),
            ("?x=1", "/?x=1"),
            ("#x", "/#x"),
            ("//example.org/x", "/example.org/x"),
            ("/\\example.org/x", "/example.org/x"),
            ("/api/v1//x", "/v1//x"),
        ] {
            let value = format!("{spelling}{path}");
            assert_eq!(concealed(&own, "location", &value), place, "{value}");
            assert_eq!(concealed(&own, "refresh", &format!("0; url={value}")), format!("0; url={place}"), "{value}");
            if !path.contains(['?', '#']) {
                let link = |place: &str| format!("<https://example.org/x>; rel=a, <{place}>; rel=\"next\"");
                assert_eq!(concealed(&own, "link", &link(&value)), link(place), "{value}");
            }
        }
    }
    // As a part of a URL that leads elsewhere.
    for (value, expected) in [
        ("https://sso.example/?to=http%3A%2F%2F10.0.0.1%3A8000%2Fa&x=1", "https://sso.example/?to=%2Fa&x=1"),
        ("https://sso.example/?to=http://10.0.0.1:8000/api/v1/a", "https://sso.example/?to=/v1/a"),
        ("/login?to=https%3A%2F%2F10.0.0.1%2Fapi%2Fv1%2Fa", "/login?to=%2Fv1%2Fa"),
        ("http://10.0.0.1:8000/a?to=http://10.0.0.1:8000/b", "/a?to=/b"),
        ("http://a;b@10.0.0.1:8000/x", "http://a;b@-/x"),
    ] {
        assert_eq!(concealed(&own, "location", value), expected, "{value}");
    }
}

#[test]
fn what_leads_elsewhere_is_left_alone() {
    let own = own("10.0.0.1:8000", "/api/v1");
    for value in [
        "http://10.0.0.1:80001/x",
        "http://10.0.0.1:8001/x",
        "http://10.0.0.10:8000/x",
        "http://110.0.0.1:8000/x",
        "http://10.0.0.1.example.org:8000/x",
        "http://10.0.0.1@example.org/x",
        "http://example.org/10.0.0.1",
        "http://example.org/vllm-1:8000",
        "https://example.org/x",
        "https://localhost/x",
        "http://localhost:3000/x",
        "http://127.0.0.1/x",
        "http://[fd00::1]:8000/x",
        "http://vllm-2:8000/x",
        "//example.org/x",
        "/api/v1/x",
        "/x//10.0.0.1",
        "mailto:10.0.0.1",
        "vllm-1:8001",
        "avllm-1:8000",
        "vllm-1:80001",
        "org/vllm-1:8000",
        "localhost:3000",
        "notlocalhost:8000",
        "localhost",
        "vllm-1",
        "10.0.0.1",
        "10.0.0.1:80",
        "application/json; version=10.0.0.1",
        "%",
        "%2",
        "http://",
        "http:",
        "//",
        "[",
        "[::1",
        "",
    ] {
        for name in ["location", "x-any"] {
            assert_eq!(own.conceal(name.as_bytes(), value.as_bytes()), Concealed::AsIs, "{name}: {value}");
        }
    }
}

#[test]
fn other_headers_say_nothing_of_it_either() {
    let own = own("10.0.0.1:8000", "/v1");
    for (name, value, expected) in [
        ("Alt-Svc", "h2=\"10.0.0.1:8000\"; ma=60", "dropped"),
        ("alt-svc", "h3=\":443\", h2=\"[::ffff:a00:1]:8000\"", "dropped"),
        ("alt-svc", "h3=\":443\"; ma=60, h2=\"cdn.example://\"", "h3=\":443\"; ma=60, h2=\"cdn.example://\""),
        ("Set-Cookie", "a=1; Domain=10.0.0.1; Path=/", "a=1; Path=/"),
        ("set-cookie", "a=10.0.0.1;domain=.10.0.0.1", "a=10.0.0.1"),
        ("set-cookie", "a=http://10.0.0.1:8000/x; Domain=example.org", "a=/x; Domain=example.org"),
        ("Set-Cookie", "a=1; DOMAIN = \"10.0.0.1\"", "a=1"),
        ("Set-Cookie", "a=1;Domain=vllm-1", "a=1"),
        ("Set-Cookie", "a=1; Domain=.VLLM-1.; Secure", "a=1; Secure"),
        ("Set-Cookie", "a=1; Domain=0123456789ab", "a=1"),
        ("Set-Cookie", "a=1; Domain=.localhost", "a=1"),
        ("Set-Cookie", "domain=vllm-1; Domain=vllm-2", "domain=vllm-1; Domain=vllm-2"),
        ("Alt-Svc", "h2=\":8000\"", "dropped"),
        ("alt-svc", "h2=\"vllm-1:8000\"", "dropped"),
        ("alt-svc", "h2=\"localhost:8000\"", "dropped"),
        ("X-Served-By", "vllm-1:8000", "-"),
        ("x-served-by", "VLLM-1.:8000", "-"),
        ("x-served-by", "0123456789ab:8000", "-"),
        ("x-upstream-host", "localhost:8000", "-"),
        ("x-upstream-host", "127.0.0.1:8000, [::1]:8000, 0.0.0.0:8000", "-, -, -"),
        ("x-upstream-host", "167772161:8000", "-"),
        ("Warning", "199 vllm-1:8000 \"slow\"", "199 - \"slow\""),
        ("Via", "1.1 localhost:8000 (uvicorn)", "1.1 - (uvicorn)"),
        ("Forwarded", "host=\"vllm-1:8000\";proto=http", "host=\"-\";proto=http"),
        ("x-any", "tcp:10.0.0.1:8000", "tcp:-"),
        ("x-any", "grpc://vllm-1:8000/x", "grpc://-/x"),
        ("location", "https:167772161:8000/x", "/x"),
        ("location", "http:0x0a000001:8000/x", "/x"),
        ("location", "http://a.localhost:8000/x", "/x"),
        ("X-Served-By", "10.0.0.1:8000", "-"),
        ("x-upstream", "a, 10.0.0.1:8000, [::ffff:10.0.0.1]:8000", "a, -, -"),
        ("www-authenticate", "Basic realm=\"10.0.0.1:8000\"", "Basic realm=\"-\""),
        ("Access-Control-Allow-Origin", "http://10.0.0.1:8000", "/"),
        ("content-security-policy", "connect-src 'self' ws://10.0.0.1:8000 *.x", "connect-src 'self' / *.x"),
    ] {
        assert_eq!(concealed(&own, name, value), expected, "{name}: {value}");
    }
}

#[test]
fn addresses_of_six_and_default_ports_are_known_in_every_form() {
    let six = own("[fd00::1]:80", "");
    for spelling in [
        "http://[fd00::1]",
        "http://[FD00:0:0:0:0:0:0:1]:80",
        "//[fd00::0.0.0.1]",
        "http://[fd00::1%25eth0]:80",
        "http://u@[fd00:0::1]",
        "http://localhost",
        "http://[::1]:80",
    ] {
        assert_eq!(concealed(&six, "location", &format!("{spelling}/x")), "/v1/x", "{spelling}");
    }
    assert_eq!(concealed(&six, "x-any", "[FD00::1]:80"), "-");
    assert_eq!(concealed(&six, "location", "http://[fd00::2]/x"), "http://[fd00::2]/x");
    let mapped = OwnAddress::new("[::ffff:10.0.0.1]:443".parse().unwrap(), [], "/v1");
    assert_eq!(concealed(&mapped, "location", "https://10.0.0.1/x"), "/x");
}

proptest! {
    #[test]
    fn nothing_makes_trouble_and_the_plain_address_never_leaves(
        value in "[ -~]{0,20}(http:|//|[\\\\/:@%\\[\\]0-9a-f.]{0,9}|10.0.0.1:8000|%2F){0,6}[ -~]{0,20}",
        name in "(location|link|refresh|set-cookie|alt-svc|x)",
    ) {
        let own = own("10.0.0.1:8000", "/api/v1");
        if let Concealed::Changed(to) = own.conceal(name.as_bytes(), value.as_bytes()) {
            prop_assert_ne!(&to, value.as_bytes());
        }
    }

    #[test]
    fn values_that_are_passed_at_once_say_nothing_of_it(
        value in "(h2=|http|[ a-z0-9./,;=\"-]{0,3}|/|\t|:|%2F|\\\\|10[.]0[.]0[.]1|8000|vllm-1|localhost){0,8}",
    ) {
        let value = value.as_bytes();
        if !may_hold_authority(value) {
            prop_assert_eq!(own("10.0.0.1:8000", "/api/v1").replaced(value), None);
        }
    }

    #[test]
    fn no_bytes_make_trouble(value in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _ = own("10.0.0.1:8000", "").conceal(b"location", &value);
        let _ = own("[fd00::1]:80", "/v1").conceal(b"set-cookie", &value);
    }
}

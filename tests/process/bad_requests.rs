//! Requests that are no requests, and bodies that are no bodies.

use serde_json::json;

use super::{before, refusal};
use crate::support::artifacts::Noise;
use crate::support::ballast::Ballast;
use crate::support::http::Client;

/// What became of bytes sent on a connection of their own.
#[derive(Debug, PartialEq)]
enum Outcome {
    Status(u16),
    Closed,
}

/// Sends bytes and reads the answer. The sending side is shut after it, so that whoever waits for
/// more knows that none will come.
fn outcome(ballast: &Ballast, bytes: &[u8]) -> Outcome {
    let mut client = ballast.api();
    // The other side may have closed before it has read everything.
    let _ = client.send(bytes);
    let _ = client.stream().shutdown(std::net::Shutdown::Write);
    match client.receive() {
        Ok(answer) => Outcome::Status(answer.status),
        Err(_) => Outcome::Closed,
    }
}

#[test]
fn what_is_no_http_is_answered_with_4xx_or_a_closed_connection() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    let mut noise = vec![0; 100_000];
    Noise(42).fill(&mut noise);
    let ping = "/api/v1/vmm.ping";
    let many_headers = (0..2000).fold(format!("GET {ping} HTTP/1.1\r\n"), |head, n| {
        head + &format!("X-{n}: y\r\n")
    });
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("noise", noise),
        ("zeros", vec![0; 10_000]),
        ("line feeds", vec![b'\n'; 100_000]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
        ("HTTP/0.9", format!("GET {ping}\r\n").into()),
        ("HTTP/9.9", format!("GET {ping} HTTP/9.9\r\n\r\n").into()),
        ("no path", b"GET HTTP/1.1\r\n\r\n".to_vec()),
        ("a path with blanks", b"GET /a b c HTTP/1.1\r\n\r\n".to_vec()),
        ("a path of a megabyte", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20)).into()),
        ("a header of a megabyte", format!("GET {ping} HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(1 << 20)).into()),
        ("2000 headers", (many_headers + "\r\n").into()),
        ("a header without a colon", format!("GET {ping} HTTP/1.1\r\nnonsense\r\n\r\n").into()),
        ("a zero in a header", format!("GET {ping} HTTP/1.1\r\nA: b\0c\r\n\r\n").into()),
        ("a negative length", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}".to_vec()),
        ("a length of words", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: ten\r\n\r\n{}".to_vec()),
        ("two lengths", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}".to_vec()),
        ("the largest length", format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{{}}", u64::MAX).into()),
        ("a longer length", format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{{}}", "9".repeat(40)).into()),
        ("broken chunks", b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n".to_vec()),
        ("an endless chunk", b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}".to_vec()),
        ("an unknown coding", b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n{}".to_vec()),
        ("half a request line", b"PUT /api/v1/vm.cre".to_vec()),
        ("half the headers", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Le".to_vec()),
        ("half a body", b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{\"memory\"".to_vec()),
        ("no body after 100-continue", b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n".to_vec()),
    ];
    for (what, bytes) in cases {
        let outcome = outcome(&ballast, &bytes);
        let fine = match outcome {
            Outcome::Closed => true,
            // 100: the answer to `Expect`, after which the connection is closed.
            Outcome::Status(status) => status == 100 || (400..500).contains(&status),
        };
        assert!(fine, "{what}: {outcome:?}");
        ballast.assert_well();
    }
    before.assert_unchanged(&mut ballast, &mut client, "what is no HTTP");
}

#[test]
fn wrong_methods_and_paths_are_4xx_and_the_connection_lives_on() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for (method, path) in [
        ("POST", "vm.create"),
        ("GET", "vm.create"),
        ("DELETE", "vm.delete"),
        ("PATCH", "vm.boot"),
        ("PUT", "vm.info"),
        ("PUT", "vmm.ping"),
        ("OPTIONS", "vm.info"),
        ("TRACE", "vm.info"),
        ("BREW", "vm.info"),
        ("GET", ""),
        ("GET", "vm.info/"),
        ("GET", "../v1/vm.info"),
        ("GET", "vm.resize"),
        ("PUT", "vm.snapshot"),
        ("GET", "%00"),
    ] {
        let answer = client.request(method, path, None);
        refusal(answer, &format!("{method} {path}"));
    }
    before.assert_unchanged(&mut ballast, &mut client, "wrong methods");
}

#[test]
fn bodies_that_are_no_json_are_refused_and_the_connection_lives_on() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(10_000), close.repeat(10_000));
    for body in [
        "",
        "{",
        "}",
        "null",
        "true",
        "42",
        "\"text\"",
        "[]",
        "{}{}",
        "{\"memory\": {\"size\": 1",
        "{\"memory\": {\"size\": NaN}}",
        "{'memory': 1}",
        "{\"memory\": {\"size\": 1}, \"memory\": {\"size\": 2}}",
        "\u{feff}{}",
        "{\"payload\": {\"kernel\": \"\\ud800\"}}",
        &deep("[", "]"),
        &deep("{\"a\":", "}"),
        &format!("{{\"payload\": {}}}", deep("{\"kernel\":", "}")),
        &"[".repeat(1 << 20),
    ] {
        for path in ["vm.create", "vm.add-disk", "vm.remove-device"] {
            let answer = client.request("PUT", path, Some(body));
            let what: String = body.chars().take(60).collect();
            refusal(answer, &format!("{path} {what}"));
        }
    }
    let mut invalid = ballast.api();
    invalid
        .send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4\r\n\r\n\"\xff\xfe\"")
        .unwrap();
    refusal(invalid.receive().unwrap(), "no UTF-8");
    drop(invalid);
    before.assert_unchanged(&mut ballast, &mut client, "no JSON");
}

#[test]
fn a_body_where_none_belongs_is_refused() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    let before = before(&ballast, &mut client);
    for path in [
        "vm.boot",
        "vm.shutdown",
        "vm.pause",
        "vm.delete",
        "vmm.shutdown",
    ] {
        let answer = client.request("PUT", path, Some("{\"force\": true}"));
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
    }
    before.assert_unchanged(&mut ballast, &mut client, "unexpected bodies");
}

#[test]
fn a_body_over_the_limit_is_refused_without_being_kept() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    let mebibytes = 64;
    for chunked in [false, true] {
        let mut other = ballast.api();
        let head = if chunked {
            "Transfer-Encoding: chunked".to_owned()
        } else {
            format!("Content-Length: {}", mebibytes << 20)
        };
        other
            .send(format!("PUT /api/v1/vm.create HTTP/1.1\r\n{head}\r\n\r\n").as_bytes())
            .unwrap();
        let block = vec![b' '; 1 << 20];
        for _ in 0..mebibytes {
            let sent = if chunked {
                let chunk = [b"100000\r\n", block.as_slice(), b"\r\n"].concat();
                other.send(&chunk)
            } else {
                other.send(&block)
            };
            if sent.is_err() {
                break; // Closed, which is an answer.
            }
        }
        if let Ok(answer) = other.receive() {
            assert!((400..500).contains(&answer.status), "{}", answer.text());
        }
        let resident = crate::support::procfs::resident_bytes(ballast.pid());
        assert!(resident < 48 << 20, "{resident} bytes resident");
    }
    before.assert_unchanged(&mut ballast, &mut client, "a large body");
}

#[test]
fn requests_in_one_packet_are_answered_in_order() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    let ping = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";
    let info = "GET /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r\n";
    client
        .send(format!("{ping}{info}{ping}{info}").as_bytes())
        .unwrap();
    for expected in [200, 404, 200, 404] {
        assert_eq!(client.receive().unwrap().status, expected);
    }
}

#[test]
fn descriptors_sent_with_a_request_that_wants_none_are_closed() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;

    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for _ in 0..50 {
        let other = ballast.api();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = [file.as_fd(); 10];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(10))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let request = b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\n\r\n";
        let bytes = [std::io::IoSlice::new(request)];
        sendmsg(other.stream(), &bytes, &mut control, SendFlags::empty()).unwrap();
        let (stream, _) = other.into_parts();
        let mut other = Client::over(stream);
        refusal(other.receive().unwrap(), "vm.pause");
    }
    before.assert_unchanged(&mut ballast, &mut client, "unwanted descriptors");
}

#[test]
fn a_hot_add_of_an_unbootable_kind_of_body_changes_a_running_vm_in_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let before = before(&ballast, &mut client);
    for body in [
        json!({}),
        json!({"path": 1}),
        json!({"path": "/dev/null", "num_queues": 2}),
        json!({"path": "/dev/null", "pci_device_id": 1.5}),
        json!([{"path": "/dev/null"}]),
    ] {
        refusal(client.try_put_json("vm.add-disk", &body), &body.to_string());
    }
    for id in [
        json!({}),
        json!({"id": 1}),
        json!({"id": ""}),
        json!({"id": "nobody"}),
    ] {
        refusal(
            client.try_put_json("vm.remove-device", &id),
            &id.to_string(),
        );
    }
    before.assert_unchanged(&mut ballast, &mut client, "hot-adds");
}

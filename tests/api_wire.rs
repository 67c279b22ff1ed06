//! The bytes on the wire, as Cloud Hypervisor's clients need them.

mod api_support;

use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Duration;

use api_support::{Client, Server, request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::state::State;

const SERVER: &str = ballast_api::server::SERVER;

#[test]
fn a_ping_is_answered_in_exactly_these_bytes() {
    let server = Server::start();
    let mut client = server.connect();
    client.send("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let body = format!(
        "{{\"build_version\":\"v53.0.0-ballast-{}\",\"version\":\"53.0.0\",\"pid\":{},\
         \"features\":[\"io_uring\",\"kvm\"]}}",
        env!("CARGO_PKG_VERSION"),
        std::process::id()
    );
    let expected = format!(
        "HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Server: {SERVER}\r\n\r\n{body}",
        body.len()
    );
    // One recv of 1023 bytes, as libvirt does it after add-net.
    let mut bytes = [0; 1023];
    let count = client.stream.read(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes[..count]), expected);
}

#[test]
fn an_order_that_was_carried_out_is_answered_in_exactly_these_bytes() {
    let server = Server::start();
    let mut client = server.connect();
    client.send(request("PUT", "vm.create", "{}"));
    let mut bytes = [0; 1023];
    let count = client.stream.read(&mut bytes).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&bytes[..count]),
        format!("HTTP/1.1 204 \r\nServer: {SERVER}\r\n\r\n")
    );
}

#[test]
fn an_error_is_answered_in_exactly_these_bytes() {
    let server = Server::start();
    let mut client = server.connect();
    client.send("GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut bytes = [0; 1023];
    let count = client.stream.read(&mut bytes).unwrap();
    let body = r#"["vm.info failed","VM is not created"]"#;
    assert_eq!(
        String::from_utf8_lossy(&bytes[..count]),
        format!(
            "HTTP/1.1 404 \r\nContent-Length: {}\r\nContent-Type: application/json\r\n\
             Server: {SERVER}\r\n\r\n{body}",
            body.len()
        )
    );
}

/// The way Cloud Hypervisor's `api_client` takes an answer apart, with all that it trips over.
fn parse_as_ch_remote(stream: &mut std::os::unix::net::UnixStream) -> (u16, Option<String>) {
    let mut text = String::new();
    let mut body_at = None;
    let mut length: Option<usize> = None;
    loop {
        let mut bytes = [0; 256];
        let count = stream.read(&mut bytes).unwrap();
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        if length.is_none()
            && let Some(at) = text.find("Content-Length: ")
            && let Some(end) = text[at..].find("\r\n")
        {
            length = Some(
                text[at + "Content-Length: ".len()..at + end]
                    .parse()
                    .unwrap(),
            );
        }
        if body_at.is_none() {
            body_at = text.find("\r\n\r\n").map(|at| at + 4);
        }
        let (Some(at), wanted) = (body_at, length.unwrap_or(0)) else {
            assert_ne!(count, 0);
            continue;
        };
        if text.len() >= at + wanted {
            let line = &text["HTTP/1.1 ".len()..text.find('\r').unwrap()];
            let body = text[at..at + wanted].to_owned();
            return (line.trim().parse().unwrap(), length.map(|_| body));
        }
    }
}

#[test]
fn ch_remote_understands_answers_with_and_without_a_body() {
    let server = Server::start();
    let mut client = server.connect();
    // It sends the line with the descriptors, then the length, then the body, and no content type.
    let body = r#"{"disks":[{"path":"/d","id":"K\u00f6ln-\u65e5\u672c"}]}"#;
    for part in [
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n",
        &format!("Content-Length: {}\r\n", body.len()),
        "\r\n",
        body,
    ] {
        client.send(part);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(parse_as_ch_remote(&mut client.stream), (204, None));
    client.send("GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (status, body) = parse_as_ch_remote(&mut client.stream);
    let body = body.unwrap();
    assert_eq!(status, 200);
    assert!(body.is_ascii());
    let info: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(info["config"]["disks"][0]["id"], "Köln-日本");
    client.send("PUT /api/v1/vm.resume HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (status, body) = parse_as_ch_remote(&mut client.stream);
    assert_eq!(status, 409);
    let errors: Vec<String> = serde_json::from_str(&body.unwrap()).unwrap();
    assert!(errors.len() >= 2);
}

#[test]
fn a_request_may_come_in_single_bytes() {
    let server = Server::start();
    let mut client = server.connect();
    for byte in request("PUT", "vm.create", r#"{"cpus":{"boot_vcpus":2}}"#).bytes() {
        client.send([byte]);
    }
    assert_eq!(client.answer().status, 204);
    assert_eq!(
        client.get("vm.info").json()["config"]["cpus"]["boot_vcpus"],
        2
    );
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = Server::start();
    let mut client = server.connect();
    let mut all = request("PUT", "vm.create", "{}");
    all += &request("PUT", "vm.boot", "");
    all += "GET /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r\n";
    all += &request("PUT", "vm.nothing", "");
    all += "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";
    client.send(all);
    let answers: Vec<_> = (0..5).map(|_| client.answer()).collect();
    let statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [204, 204, 200, 404, 200]);
    assert_eq!(answers[2].json()["state"], "Running");
}

#[test]
fn query_strings_and_absolute_uris_are_accepted() {
    let server = Server::start();
    let mut client = server.connect();
    assert_eq!(client.get("vmm.ping?x=1").status, 200);
    client.send("GET http://localhost/api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(client.answer().status, 200);
}

#[test]
fn a_wrong_method_is_refused_by_naming_the_right_one() {
    let server = Server::start();
    let mut client = server.connect();
    for (method, operation, allow) in [
        ("PUT", "vmm.ping", "GET"),
        ("POST", "vm.info", "GET"),
        ("GET", "vm.create", "PUT"),
        ("DELETE", "vm.delete", "PUT"),
        ("PATCH", "vm.add-disk", "PUT"),
        ("OPTIONS", "vm.boot", "PUT"),
    ] {
        client.send(request(method, operation, ""));
        let answer = client.answer();
        assert_eq!(answer.status, 405, "{method} {operation}");
        assert!(
            answer.has_header(&format!("Allow: {allow}")),
            "{}",
            answer.head
        );
        assert!(answer.json()[1].as_str().unwrap().contains(allow));
    }
    assert_eq!(client.get("vmm.ping").status, 200);
    for operation in ["vmm.ping", "vm.boot"] {
        let mut client = server.connect();
        client.send(format!(
            "HEAD /api/v1/{operation} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ));
        let text = client.rest();
        assert!(text.starts_with("HTTP/1.1 405 \r\n"), "{text}");
        assert!(
            text.ends_with("\r\n\r\n"),
            "the answer to HEAD has no body: {text}"
        );
    }
}

#[test]
fn a_path_where_nothing_is_answers_404_in_the_one_shape() {
    let server = Server::start();
    let mut client = server.connect();
    for target in [
        "/",
        "/api/v1",
        "/api/v1/",
        "/api/v2/vmm.ping",
        "/api/v1/vmm.ping/",
    ] {
        client.send(format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let answer = client.answer();
        assert_eq!(answer.status, 404, "{target}");
        let errors: Vec<String> = serde_json::from_slice(&answer.body).unwrap();
        assert!(errors[0].starts_with("Not Found"));
    }
    let answer = client.put("vm.resize-zone", r#"{"id":"a","desired_ram":1}"#);
    assert_eq!(answer.status, 404);
    let text = answer.text();
    assert!(text.contains("not supported yet: vm.resize-zone"));
}

#[test]
fn what_is_not_http_is_answered_in_the_one_shape_and_closed() {
    let server = Server::start();
    for (bytes, status) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        ("GET /a b HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), 400),
        (
            format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(70_000)),
            431,
        ),
    ] {
        let mut client = server.connect();
        // The server may close before it has taken everything.
        let _ = std::io::Write::write_all(&mut client.stream, bytes.as_bytes());
        let answer = client.answer();
        assert_eq!(answer.status, status, "{}", &bytes[..10]);
        assert!(answer.head.starts_with(&format!("HTTP/1.1 {status} \r\n")));
        serde_json::from_slice::<Vec<String>>(&answer.body).unwrap();
        assert_eq!(client.rest(), "");
    }
    let mut client = server.connect();
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    let text = client.rest();
    assert!(
        text.is_empty() || text.starts_with("HTTP/1.1 400 \r\n"),
        "{text}"
    );
    assert_eq!(server.connect().get("vmm.ping").status, 200);
}

#[test]
fn who_expects_100_continue_gets_it_before_the_body_is_sent() {
    let server = Server::start();
    let mut client = server.connect();
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\
         Expect: 100-continue\r\n\r\n",
    );
    let interim = client.read_until("\r\n\r\n");
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    client.send("{}");
    assert_eq!(client.answer().status, 204);
    // What would be refused anyway is refused before the body is sent.
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\
         Expect: 100-continue\r\n\r\n",
    );
    assert_eq!(client.answer().status, 413);
}

#[test]
fn a_chunked_body_is_accepted() {
    let server = Server::start();
    let mut client = server.connect();
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.send(format!("{head}1\r\n{{\r\n1\r\n}}\r\n0\r\n\r\n"));
    assert_eq!(client.answer().status, 204);
    // Older libvirt sends no body in chunks.
    client.send(head.replace("create", "boot") + "0\r\n\r\n");
    assert_eq!(client.answer().status, 204);
    client.send(head.replace("create", "nmi") + "nonsense\r\n");
    assert_eq!(client.answer().status, 400);
}

#[test]
fn no_content_type_is_demanded_and_any_is_accepted() {
    let server = Server::start();
    let mut client = server.connect();
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n\
         Content-Length: 2\r\n\r\n{}",
    );
    assert_eq!(client.answer().status, 204);
}

#[test]
fn a_body_over_the_limit_is_refused_however_it_is_sent() {
    let server = Server::start();
    let mut client = server.connect();
    client.send("PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 4194305\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.status, 413);
    assert!(answer.has_header("Connection: close"));
    assert!(answer.text().contains("4194304"));

    let mut client = server.connect();
    let sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        use std::io::Write;
        let mut sender = sender;
        let head =
            "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunk = format!("10000\r\n{}\r\n", " ".repeat(65536));
        // Ends with an error when the server has had enough.
        sender.write_all(head.as_bytes())?;
        (0..1000).try_for_each(|_| sender.write_all(chunk.as_bytes()))
    });
    let answer = client.answer();
    assert_eq!(answer.status, 413);
    assert!(sending.join().unwrap().is_err());

    // Right at the limit it is read, and found to be empty.
    let mut client = server.connect();
    let answer = client.put("vm.create", &" ".repeat(4 << 20));
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("empty"));
}

#[test]
fn who_asks_for_problem_details_gets_them() {
    let server = Server::start();
    let mut client = server.connect();
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nAccept: application/problem+json\r\n\
         Content-Length: 25\r\n\r\n{\"cpus\":{\"boot_vcpus\":0}}",
    );
    let answer = client.answer();
    assert_eq!(answer.status, 400);
    assert!(answer.has_header("Content-Type: application/problem+json"));
    let problem = answer.json();
    assert_eq!(problem["code"], "invalid");
    assert_eq!(problem["field"], "cpus.boot_vcpus");
    assert_eq!(problem["status"], 400);
    assert_eq!(problem["type"], "urn:ballast:problem:invalid");
}

#[test]
fn an_operation_without_a_body_refuses_one() {
    let server = Server::with_vm(State::Created);
    let mut client = server.connect();
    let answer = client.put("vm.boot", "{}");
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("no body"));
    assert_eq!(client.put("vm.boot", "").status, 204);
    // Nor does libcurl say how long nothing is, when it is told nothing.
    client.send("PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.answer().status, 204);
}

#[test]
fn a_client_that_has_sent_all_may_close_its_half() {
    let server = Server::start();
    let mut client = server.connect();
    client.send("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n");
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.rest(), "");
}

#[test]
fn http_1_0_and_connection_close_are_respected() {
    let server = Server::start();
    let mut client = server.connect();
    client.send("GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n");
    assert!(client.rest().ends_with('}'));
    let mut client = server.connect();
    client.send("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.rest(), "");
}

fn send_with_descriptors(client: &Client, bytes: &str, count: usize) {
    let null = std::fs::File::open("/dev/null").unwrap();
    let descriptors = vec![null.as_fd(); count];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let sent = sendmsg(
        &client.stream,
        &[IoSlice::new(bytes.as_bytes())],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    assert_eq!(sent, bytes.len());
}

#[test]
fn descriptors_arrive_with_the_request_they_came_with() {
    let server = Server::start();
    let mut client = server.connect();
    send_with_descriptors(&client, &request("PUT", "vm.create", "{}"), 2);
    let answer = client.answer();
    assert_eq!(answer.status, 400);
    assert!(
        answer.text().contains("2 file descriptors"),
        "{}",
        answer.text()
    );
    // They are not taken for the next request's.
    let mut client = server.connect();
    send_with_descriptors(&client, "GET /api/v1/vmm.ping HTTP/1.1\r\n", 3);
    client.send("Host: x\r\n\r\n");
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.put("vm.create", "{}").status, 204);
}

#[test]
fn the_document_is_served_in_both_versions() {
    let server = Server::start();
    let mut client = server.connect();
    let answer = client.get("openapi.json");
    assert_eq!(answer.json()["openapi"], "3.1.0");
    assert!(answer.body.is_ascii());
    assert_eq!(
        client.get("openapi.json?version=3.0").json()["openapi"],
        "3.0.3"
    );
    assert_eq!(client.get("openapi.json?version=2").status, 400);
}

/// The document and the router are two lists; this is what keeps them one.
#[test]
fn every_documented_operation_is_there_and_takes_the_documented_method_only() {
    let server = Server::start();
    let document = server.connect().get("openapi.json").json();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in ["GET", "PUT"] {
            let mut client = server.connect();
            let wrong = item.get(method.to_lowercase()).is_none();
            if path == "/vmm.shutdown" && !wrong {
                continue;
            }
            client.send(request(method, path.trim_start_matches('/'), ""));
            let head = client.read_until("\r\n\r\n");
            assert_eq!(
                head.starts_with("HTTP/1.1 405"),
                wrong,
                "{method} {path}: {head}"
            );
            assert!(
                !head.contains("not-found") && !head.contains("Not Found"),
                "{path}"
            );
        }
    }
}

#[test]
fn vmm_shutdown_is_answered_before_the_process_ends() {
    let server = Server::start();
    let mut idle = server.connect();
    assert_eq!(idle.get("vmm.ping").status, 200);
    let mut client = server.connect();
    assert_eq!(client.put("vmm.shutdown", "").status, 204);
    assert_eq!(client.rest(), "");
    assert_eq!(idle.rest(), "");
}

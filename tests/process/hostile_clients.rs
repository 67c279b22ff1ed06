//! Clients that come in crowds, stop half-way, or never listen.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::before;
use crate::support::ballast::Ballast;
use crate::support::http::Client;
use crate::support::procfs::resident_bytes;

#[test]
fn half_sent_requests_keep_nobody_waiting() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    let halves: [&[u8]; 5] = [
        b"",
        b"P",
        b"PUT /api/v1/vm.create HTTP/1.1\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"memory\":",
    ];
    let waiting: Vec<Client> = halves
        .iter()
        .cycle()
        .take(50)
        .map(|half| {
            let mut client = ballast.api();
            client.send(half).unwrap();
            client
        })
        .collect();
    for _ in 0..20 {
        client.request("GET", "vmm.ping", None).expect(200);
    }
    ballast.assert_well();
    drop(waiting);
    before.assert_unchanged(&mut ballast, &mut client, "half-sent requests");
}

#[test]
fn five_hundred_connections_are_served_or_turned_away_and_leave_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    let before = before(&ballast, &mut client);
    for _ in 0..2 {
        let mut crowd: Vec<Client> = (0..500)
            .filter_map(|_| Client::connect(&ballast.socket()).ok())
            .collect();
        let mut served = 0;
        for member in &mut crowd {
            member
                .stream()
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            match member.try_request("GET", "vmm.ping", None, "") {
                Ok(answer) if answer.status == 200 => served += 1,
                Ok(answer) => assert!(matches!(answer.status, 429 | 503), "{}", answer.text()),
                Err(_) => {}
            }
        }
        assert!(served >= 32, "only {served} were served");
        // Who was there before is still served.
        client.request("GET", "vmm.ping", None).expect(200);
        drop(crowd);
        before.assert_unchanged(&mut ballast, &mut client, "a crowd");
    }
}

#[test]
fn clients_that_leave_without_waiting_for_the_answer_leave_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    let before = before(&ballast, &mut client);
    for path in [
        "GET /api/v1/vm.info",
        "PUT /api/v1/vm.pause",
        "GET /api/v1/vm.events",
    ] {
        for _ in 0..100 {
            let mut other = ballast.api();
            other
                .send(format!("{path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
                .unwrap();
        }
    }
    before.assert_unchanged(&mut ballast, &mut client, "clients that left");
}

#[test]
fn a_client_that_never_reads_its_events_costs_nothing_and_delays_nobody() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    let before = before(&ballast, &mut client);
    let deaf: Vec<UnixStream> = (0..10)
        .map(|_| {
            let mut client = ballast.api();
            client
                .send(b"GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
            client.head().unwrap();
            client.into_parts().0
        })
        .collect();
    let listening = ballast.events();
    let resident = resident_bytes(ballast.pid());
    // Four events each, far more than the socket buffers of the deaf ones hold.
    for _ in 0..1000 {
        client.put("vm.pause");
        client.put("vm.resume");
    }
    let mark = listening.mark();
    client.put("vm.pause");
    listening.wait_after(mark, "paused", |_| true);
    client.put("vm.resume");
    listening.wait_after(mark, "resumed", |_| true);
    let grown = resident_bytes(ballast.pid()).saturating_sub(resident);
    assert!(grown < 16 << 20, "grown by {grown} bytes");
    drop(deaf);
    drop(listening);
    before.assert_unchanged(&mut ballast, &mut client, "deaf clients");
}

#[test]
fn many_clients_at_once_never_get_each_others_answers() {
    let mut ballast = Ballast::start();
    let socket = ballast.socket();
    let workers: Vec<_> = (0..16)
        .map(|number| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let mut client = Client::connect(&socket).unwrap();
                for round in 0..100 {
                    let path = format!("nothing-{number}-{round}");
                    let answer = client.request("GET", &path, None).expect(404);
                    assert!(answer.text().contains(&path), "{}", answer.text());
                    client.request("GET", "vmm.ping", None).expect(200);
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    ballast.assert_well();
}

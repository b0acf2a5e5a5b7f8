//! Forwarded ports.

use std::time::Instant;

use futures_util::future::join_all;
use podsandbox::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{MIB, noise, watcher};
use crate::FOREVER;
use crate::harness::{Container, Guest, Image, PATIENCE, artifacts};

#[tokio::test]
async fn ports_of_the_loopback_are_reached() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(watcher(&root)).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = format!(
        "echo four > /tmp/index.html; httpd -h /tmp -p 127.0.0.1:8080; \
         httpd -h /tmp -p [::1]:8081; nc -ll -p 9000 -e cat & nc -ll -p 9001 -e sleep 300 & {FOREVER}"
    );
    guest.run(Container::sh("web", &root, &script)).await;
    let daemon = guest.daemon.clone();
    let deadline = Instant::now() + PATIENCE;
    for port in [8080, 8081, 9000, 9001] {
        // Until it listens.
        while let Err(error) = daemon.port_forward("pod", port).await {
            assert!(matches!(error, Error::Forward { .. }), "{error}");
            assert!(Instant::now() < deadline, "{error}");
        }
    }
    let ask = async |port| {
        let mut stream = daemon.port_forward("pod", port).await.unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    for port in [8080, 8081] {
        let answer = timeout(PATIENCE, ask(port)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1") && answer.ends_with("four\n"),
            "{answer}"
        );
    }
    let answers = (0..50).map(|number| ask([8080, 8081][number % 2]));
    let answers = timeout(PATIENCE, join_all(answers)).await.unwrap();
    assert!(answers.iter().all(|answer| answer.ends_with("four\n")));

    // Half-closed, with all of the answer to come.
    let input = noise(8 * MIB);
    let stream = daemon.port_forward("pod", 9000).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let mut output = Vec::new();
    let (written, read) = tokio::join!(
        async {
            to.write_all(&input).await.unwrap();
            to.shutdown().await
        },
        timeout(PATIENCE, from.read_to_end(&mut output)),
    );
    written.unwrap();
    read.unwrap().unwrap();
    assert!(output == input, "{} bytes", output.len());

    let refused = daemon.port_forward("the-pod", 9).await.unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("the-pod") && text.contains("port 9"),
        "{text}"
    );
    assert!(text.contains("127.0.0.1") && text.contains("::1"), "{text}");

    // A server that neither reads nor closes does not keep what a client that
    // vanished had.
    let script = "ls -l /proc/1/fd 2> /dev/null | grep -c socket:";
    let count = async |guest: &mut Guest| {
        guest
            .exec("watcher", &["sh", "-c", script])
            .await
            .unwrap()
            .text()
    };
    let settled = Instant::now() + PATIENCE;
    let before = loop {
        let first = count(&mut guest).await;
        if first == count(&mut guest).await || Instant::now() > settled {
            break first;
        }
    };
    let mut streams = Vec::new();
    for number in 0..20 {
        let mut stream = daemon.port_forward("pod", 9001).await.unwrap();
        stream.write_all(b"never read").await.unwrap();
        if number % 2 == 0 {
            stream.shutdown().await.unwrap();
        }
        streams.push(stream);
    }
    let during = count(&mut guest).await;
    assert_ne!(during, before);
    drop(streams);
    let deadline = Instant::now() + PATIENCE / 2;
    loop {
        let now = count(&mut guest).await;
        if now == before {
            break;
        }
        assert!(Instant::now() < deadline, "{now}, not {before}");
    }
    guest.shut_down().await;
}

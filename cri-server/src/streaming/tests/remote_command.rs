//! Exec and attach over both transports.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::spdy::{Client, Got};
use super::websocket::Got as Message;
use super::{LONG, exec, http, server, soon};
use crate::streaming::hostile::Pods;
use crate::streaming::session::{AttachRequest, Wanted};
use crate::streaming::spdy::frame;
use crate::streaming::{Streaming, StreamingConfig};

const V4: &str = "v4.channel.k8s.io";
const V5: &str = "v5.channel.k8s.io";

async fn spdy_exec(server: &Streaming, argv: &[&str], streams: &str) -> Client<TcpStream> {
    let url = server.exec(exec(argv, streams)).unwrap();
    Client::new(http::spdy(&url, V4).await)
}

fn status(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn spdy_carries_input_output_and_the_end() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["cat"], "io").await;
    let error = client.open("error").await;
    let stdin = client.open("stdin").await;
    let stdout = client.open("stdout").await;
    let input: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
    let text = [&frame::data(stdin, false, input.len())[..], &input].concat();
    // Both ways at once, for cat holds little.
    let (read, mut write) = tokio::io::split(client.io);
    let sent = tokio::spawn(async move {
        write.write_all(&text).await.unwrap();
        write.write_all(&frame::data(stdin, true, 0)).await.unwrap();
        write
    });
    let mut client = Client::new(tokio::io::join(read, tokio::io::sink()));
    let all = client.rest().await;
    let echoed = &all.data[&stdout];
    assert!(*echoed == input, "{} of {}", echoed.len(), input.len());
    assert_eq!(status(&all.text(error))["status"], "Success");
    assert!(all.goodbye);
    drop(sent.await.unwrap());
}

#[tokio::test]
async fn the_exit_code_comes_after_all_output() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["exit", "3"], "ioe").await;
    let mut ids = Vec::new();
    for kind in ["error", "stdin", "stdout", "stderr"] {
        ids.push(client.open(kind).await);
    }
    let all = client.rest().await;
    assert_eq!(
        (all.text(ids[2]), all.text(ids[3])),
        ("out".into(), "err".into())
    );
    let status = status(&all.text(ids[0]));
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    assert_eq!(all.ended.len(), 3, "{all:?}");
    assert!(
        all.reset.contains(&ids[1]),
        "standard input was not ended by the client: {all:?}"
    );
    assert!(all.goodbye);
}

#[tokio::test]
async fn versions_before_4_are_told_in_plain_text() {
    let server = server(&Pods::default()).await;
    for (version, argv, text) in [
        (
            "v3.channel.k8s.io",
            ["exit", "2"],
            "command terminated with non-zero exit code: 2",
        ),
        ("v2.channel.k8s.io", ["exit", "0"], ""),
        ("channel.k8s.io", ["no", "such"], "no program"),
    ] {
        let url = server.exec(exec(&argv, "o")).unwrap();
        let mut client = Client::new(http::spdy(&url, version).await);
        let [error, _] = [client.open("error").await, client.open("stdout").await];
        let told = client.rest().await.text(error);
        assert!(
            told.contains(text) && told.is_empty() == text.is_empty(),
            "{version}: {told}"
        );
    }
}

#[tokio::test]
async fn a_failure_to_start_is_an_internal_error() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["nothing"], "o").await;
    let [error, _] = [client.open("error").await, client.open("stdout").await];
    let status = status(&client.rest().await.text(error));
    assert_eq!(status["reason"], "InternalError");
    assert!(status["message"].as_str().unwrap().contains("no program"));
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["sizes"], "tio").await;
    let [_, _, stdout, resize] = [
        client.open("error").await,
        client.open("stdin").await,
        client.open("stdout").await,
        client.open("resize").await,
    ];
    client.data(resize, b"{\"Width\":80,\"Height\":24}\n").await;
    assert_eq!(
        client.next().await,
        Some(Got::Data(stdout, b"80x24\n".to_vec()))
    );
    client
        .data(resize, b"{\"Width\":132,\"Height\":50}\n")
        .await;
    assert_eq!(
        client.next().await,
        Some(Got::Data(stdout, b"132x50\n".to_vec()))
    );
    client.fin(resize).await;
    assert!(client.rest().await.goodbye);
}

#[tokio::test]
async fn streams_that_were_not_announced_are_refused() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["cat"], "io").await;
    for kind in ["stderr", "resize", "nonsense"] {
        let id = client.syn(&[("streamtype", kind)]).await;
        assert_eq!(client.next().await, Some(Got::Reset(id)), "{kind}");
    }
    client.open("error").await;
    let second = client.syn(&[("streamtype", "error")]).await;
    assert_eq!(client.next().await, Some(Got::Reset(second)));
    client.open("stdin").await;
    client.open("stdout").await;
    let late = client.syn(&[("streamtype", "stdout")]).await;
    assert_eq!(client.next().await, Some(Got::Reset(late)));
}

#[tokio::test]
async fn pings_are_answered_and_strange_frames_survived() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["cat"], "io").await;
    let [_, stdin, stdout] = [
        client.open("error").await,
        client.open("stdin").await,
        client.open("stdout").await,
    ];
    client.send(frame::ping(1)).await;
    assert_eq!(client.next().await, Some(Got::Ping(1)));
    // Data on a stream that never was; an update of none; an unknown kind; a
    // stream with an even number and one with an old one.
    client.data(99, b"lost").await;
    assert_eq!(client.next().await, Some(Got::Reset(99)));
    client.send(frame::window_update(77, 5)).await;
    client.send([0x80, 3, 0, 99, 0, 0, 0, 1, 0]).await;
    client.data(stdin, b"still here").await;
    assert_eq!(
        client.next().await,
        Some(Got::Data(stdout, b"still here".to_vec()))
    );
    // A frame that lies about its length ends it.
    client.send([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]).await;
    // Cut off: streams may still be reset, but nobody says goodbye.
    assert!(!client.rest().await.goodbye);
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_session() {
    let pods = Pods::default();
    let server = server(&pods).await;
    let mut live = pods.live.subscribe();
    let mut client = spdy_exec(&server, &["sleep"], "io").await;
    for kind in ["error", "stdin", "stdout"] {
        client.open(kind).await;
    }
    soon(live.wait_for(|live| *live == 1)).await.unwrap();
    drop(client);
    soon(live.wait_for(|live| *live == 0)).await.unwrap();

    let url = server.exec(exec(&["sleep"], "io")).unwrap();
    let client = http::websocket(&url, V5).await;
    soon(live.wait_for(|live| *live == 1)).await.unwrap();
    drop(client);
    soon(live.wait_for(|live| *live == 0)).await.unwrap();

    let mut client = spdy_exec(&server, &["sleep"], "o").await;
    for kind in ["error", "stdout"] {
        client.open(kind).await;
    }
    soon(live.wait_for(|live| *live == 1)).await.unwrap();
    drop(server);
    soon(live.wait_for(|live| *live == 0)).await.unwrap();
    // Cut off: streams may still be reset, but nobody says goodbye.
    assert!(!client.rest().await.goodbye);
}

/// Waits until `taken` no longer grows, and gives it.
async fn settled(pods: &Pods) -> usize {
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = pods.taken.load(Ordering::SeqCst);
        if now > 0 && now == before {
            return now;
        }
        before = now;
    }
}

#[tokio::test]
async fn a_slow_reader_holds_the_process_up() {
    let pods = Pods::default();
    let server = server(&pods).await;
    let mut client = spdy_exec(&server, &["flood"], "o").await;
    let [_, stdout] = [client.open("error").await, client.open("stdout").await];
    // Sockets of both sides hold some MiB; we only a few pieces.
    let held = soon(settled(&pods)).await;
    assert!(held < 16 << 20, "{held}");
    assert!(matches!(client.next().await, Some(Got::Data(id, _)) if id == stdout));

    let pods = Pods::default();
    let server = self::server(&pods).await;
    let url = server.exec(exec(&["flood"], "o")).unwrap();
    let _client = http::websocket(&url, V5).await;
    let held = soon(settled(&pods)).await;
    assert!(held < 16 << 20, "{held}");
}

#[tokio::test]
async fn a_process_that_reads_nothing_holds_the_client_up() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["sleep"], "io").await;
    let [_, stdin, _] = [
        client.open("error").await,
        client.open("stdin").await,
        client.open("stdout").await,
    ];
    let piece = [&frame::data(stdin, false, 32 << 10)[..], &vec![0; 32 << 10]].concat();
    let mut sent = 0;
    let send = async {
        loop {
            client.io.write_all(&piece).await.unwrap();
            sent += piece.len();
            assert!(sent < 64 << 20, "never held up");
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(2), send)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn windows_of_a_client_that_opens_them_are_kept() {
    let pods = Pods::default();
    let server = server(&pods).await;
    let mut client = spdy_exec(&server, &["flood"], "o").await;
    client.send(frame::settings(1000)).await;
    let [_, stdout] = [client.open("error").await, client.open("stdout").await];
    let Some(Got::Data(_, data)) = client.next().await else {
        panic!("no data");
    };
    assert_eq!(data.len(), 1000);
    client.send(frame::window_update(stdout, 300)).await;
    assert_eq!(client.next().await, Some(Got::Data(stdout, vec![0; 300])));
    // A reset ends the output; the session goes on to its own end.
    client
        .send(frame::reset(stdout, frame::Reset::Cancel))
        .await;
    client.send(frame::ping(7)).await;
    assert_eq!(client.next().await, Some(Got::Ping(7)));
}

#[tokio::test]
async fn we_open_windows_for_what_was_read() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["cat"], "i").await;
    let [_, stdin] = [client.open("error").await, client.open("stdin").await];
    let mut opened = [0, 0];
    for _ in 0..4 {
        // cat cannot write to anyone: it takes a little, then no more.
        client.data(stdin, &[0; 16 << 10]).await;
    }
    while opened != [32 << 10; 2] {
        match client.next().await {
            Some(Got::WindowUpdate(0, delta)) => opened[0] += delta,
            Some(Got::WindowUpdate(id, delta)) if id == stdin => opened[1] += delta,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_keep_to_windows_is_not_told_of_them() {
    let server = server(&Pods::default()).await;
    let mut client = spdy_exec(&server, &["cat"], "i").await;
    let [_, stdin] = [client.open("error").await, client.open("stdin").await];
    // More at once than it was let.
    client.data(stdin, &[0; 65 << 10]).await;
    client.send(frame::ping(7)).await;
    assert_eq!(client.next().await, Some(Got::Ping(7)));
}

#[tokio::test]
async fn an_idle_session_ends_and_a_busy_one_does_not() {
    let pods = Pods::default();
    let config = StreamingConfig {
        idle_timeout_seconds: 1,
        ..Default::default()
    };
    let server = Streaming::start(&config, pods.clone()).await.unwrap();
    let mut client = spdy_exec(&server, &["sleep"], "o").await;
    client.open("error").await;
    client.open("stdout").await;
    for id in [1, 3, 5] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        client.send(frame::ping(id)).await;
        assert_eq!(client.next().await, Some(Got::Ping(id)));
    }
    // Cut off: streams may still be reset, but nobody says goodbye.
    assert!(!client.rest().await.goodbye);
    let mut live = pods.live.subscribe();
    soon(live.wait_for(|live| *live == 0)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_that_do_not_come_in_time_end_the_connection() {
    let (ours, theirs) = tokio::io::duplex(4096);
    let mut connection = crate::streaming::spdy::Connection::start(theirs, 100 * LONG);
    let wanted = exec(&[], "io").wanted;
    let collect = crate::streaming::remote_command::collect(&mut connection, wanted, true);
    let mut client = Client::new(ours);
    client.syn(&[("streamtype", "error")]).await;
    let begun = tokio::time::Instant::now();
    assert!(collect.await.is_none());
    assert_eq!(begun.elapsed(), Duration::from_secs(30));
}

#[tokio::test]
async fn websocket_carries_input_output_and_the_end() {
    let server = server(&Pods::default()).await;
    let url = server.exec(exec(&["cat"], "io")).unwrap();
    let mut client = http::websocket(&url, V5).await;
    assert_eq!(client.next().await, Some(Message::Binary(vec![1])));
    client.message(b"\0hello").await;
    assert_eq!(
        client.next().await,
        Some(Message::Binary(b"\x01hello".to_vec()))
    );
    client.frame(0x89, b"alive?").await;
    assert_eq!(client.next().await, Some(Message::Pong(b"alive?".to_vec())));
    // One message in three frames, with a ping between them.
    client.frame(0x02, b"\0wo").await;
    client.frame(0x89, b"").await;
    client.frame(0x00, b"rl").await;
    client.frame(0x80, b"d").await;
    let mut echoed: Vec<u8> = Vec::new();
    while echoed != b"world" {
        match client.next().await {
            Some(Message::Binary(data)) => echoed.extend(&data[1..]),
            Some(Message::Pong(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    client.message(&[255, 0]).await;
    let (messages, code) = client.rest().await;
    assert_eq!(code, 1000);
    let [(3, told)] = &messages[..] else {
        panic!("{messages:?}");
    };
    assert_eq!(
        status(std::str::from_utf8(told).unwrap())["status"],
        "Success"
    );
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn websocket_resizes_and_tells_the_exit_code() {
    let server = server(&Pods::default()).await;
    let url = server.exec(exec(&["sizes"], "to")).unwrap();
    let mut client = http::websocket(&url, V4).await;
    assert_eq!(client.next().await, Some(Message::Binary(vec![1])));
    client.message(b"\x04{\"Width\":10,\"Height\":20}").await;
    assert_eq!(
        client.next().await,
        Some(Message::Binary(b"\x0110x20\n".to_vec()))
    );

    let url = server.exec(exec(&["exit", "9"], "e")).unwrap();
    let (messages, code) = http::websocket(&url, V4).await.rest().await;
    assert_eq!(code, 1000);
    let on = |channel| -> Vec<u8> {
        let of = messages.iter().filter(|(number, _)| *number == channel);
        of.flat_map(|(_, data)| data.clone()).collect()
    };
    assert_eq!(on(2), b"err");
    assert!(on(1).is_empty());
    let status = status(&String::from_utf8(on(3)).unwrap());
    assert_eq!(status["details"]["causes"][0]["message"], "9");
}

#[tokio::test]
async fn a_websocket_that_breaks_the_protocol_is_told_so() {
    let server = server(&Pods::default()).await;
    let bad: [&[u8]; 4] = [
        &[0x82, 0x01, 0x00],             // not masked
        &[0x80, 0x80, 0, 0, 0, 0],       // goes on where nothing began
        &[0xf2, 0x80, 0, 0, 0, 0],       // reserved bits
        &[0x82, 0x81, 0, 0, 0, 0, 0xff], // half a close signal
    ];
    for frame in bad {
        let url = server.exec(exec(&["sleep"], "io")).unwrap();
        let mut client = http::websocket(&url, V5).await;
        client.io.write_all(frame).await.unwrap();
        assert_eq!(client.rest().await.1, 1002, "{frame:?}");
        assert_eq!(client.next().await, None);
    }
}

#[tokio::test]
async fn attach_is_served_like_exec() {
    let server = server(&Pods::default()).await;
    let wanted = Wanted {
        tty: false,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let container_id = "c".to_owned();
    let url = server
        .attach(AttachRequest {
            container_id,
            wanted,
        })
        .unwrap();
    let mut client = Client::new(http::spdy(&url, V4).await);
    let [error, stdin, stdout] = [
        client.open("error").await,
        client.open("stdin").await,
        client.open("stdout").await,
    ];
    client.data(stdin, b"anyone?").await;
    client.fin(stdin).await;
    let all = client.rest().await;
    assert_eq!(all.text(stdout), "anyone?");
    assert_eq!(status(&all.text(error))["status"], "Success");
}

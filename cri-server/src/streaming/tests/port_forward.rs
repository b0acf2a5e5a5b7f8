//! Forwarded ports over both transports.

use std::collections::BTreeMap;

use tokio::io::{AsyncRead, AsyncWrite};

use super::spdy::{Client, Got};
use super::websocket::Got as Message;
use super::{forward, http, server};
use crate::streaming::hostile::Pods;
use crate::streaming::spdy::frame;

const V1: &str = "portforward.k8s.io";

async fn pair<IO>(client: &mut Client<IO>, id: &str, port: &str) -> (u32, u32)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", id)];
    let error = client.syn(&headers("error")).await;
    let data = client.syn(&headers("data")).await;
    (error, data)
}

/// Sends on many connections at once, and reads what each gets back.
async fn shouts<IO>(mut client: Client<IO>, connections: usize)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut expected = BTreeMap::new();
    for number in 0..connections {
        let (error, data) = pair(&mut client, &number.to_string(), "80").await;
        let text = format!("hello from {number}");
        client.data(data, text.as_bytes()).await;
        client.fin(data).await;
        client.fin(error).await;
        expected.insert(data, (error, text.to_uppercase()));
    }
    let ids: Vec<u32> = expected
        .iter()
        .flat_map(|(data, (error, _))| [*data, *error])
        .collect();
    let all = client.until_ended(&ids).await;
    for (data, (error, text)) in expected {
        assert_eq!((all.text(data), all.text(error)), (text, String::new()));
    }
    assert!(all.reset.is_empty(), "{all:?}");
}

#[tokio::test]
async fn a_hundred_connections_at_once_over_spdy() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    shouts(Client::new(http::spdy(&url, V1).await), 100).await;
}

#[tokio::test]
async fn a_hundred_connections_through_a_websocket() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    let tunnel = http::websocket(&url, "SPDY/3.1+portforward.k8s.io")
        .await
        .tunnel();
    shouts(Client::new(tunnel), 100).await;
}

#[tokio::test]
async fn a_port_that_refuses_is_told_on_its_error_stream() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    let mut client = Client::new(http::spdy(&url, V1).await);
    let (error, data) = pair(&mut client, "0", "81").await;
    let all = client.until_ended(&[error, data]).await;
    assert!(all.text(error).contains("connection refused"), "{all:?}");
    // The connection serves on.
    let (_, data) = pair(&mut client, "1", "80").await;
    client.data(data, b"x").await;
    loop {
        match client.next().await {
            Some(Got::Data(id, text)) if id == data => break assert_eq!(text, b"X"),
            Some(_) => {}
            None => panic!("ended"),
        }
    }
}

#[tokio::test]
async fn streams_without_a_port_are_refused() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    let mut client = Client::new(http::spdy(&url, V1).await);
    let bad: [&[(&str, &str)]; 4] = [
        &[],
        &[("streamtype", "data")],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "stdin"), ("port", "80")],
    ];
    for headers in bad {
        let id = client.syn(headers).await;
        assert_eq!(client.next().await, Some(Got::Reset(id)), "{headers:?}");
    }
}

#[tokio::test]
async fn old_clients_pairs_are_matched_by_their_numbers() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    let mut client = Client::new(http::spdy(&url, V1).await);
    let error = client.syn(&[("streamtype", "error"), ("port", "80")]).await;
    let data = client.syn(&[("streamtype", "data"), ("port", "80")]).await;
    client.data(data, b"hi").await;
    client.fin(data).await;
    assert_eq!(client.until_ended(&[data, error]).await.text(data), "HI");
}

#[tokio::test]
async fn a_reset_ends_one_connection_and_not_the_others() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[])).unwrap();
    let mut client = Client::new(http::spdy(&url, V1).await);
    let (error, data) = pair(&mut client, "0", "80").await;
    let (_, other) = pair(&mut client, "1", "80").await;
    client.send(frame::reset(data, frame::Reset::Cancel)).await;
    client.data(other, b"go on").await;
    let mut answered = false;
    let mut ended = false;
    while !(answered && ended) {
        match client.next().await.expect("more") {
            Got::Data(id, text) => {
                assert_eq!((id, &text[..]), (other, &b"GO ON"[..]));
                answered = true;
            }
            Got::Fin(id) => {
                assert_eq!(id, error);
                ended = true;
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn channels_carry_the_ports_of_the_request() {
    let server = server(&Pods::default()).await;
    let url = server.port_forward(forward(&[80, 81])).unwrap();
    let mut client = http::websocket(&url, "v4.channel.k8s.io").await;
    let mut got: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
    client.message(b"\0shout").await;
    let text = |got: &BTreeMap<u8, Vec<u8>>, channel| -> Vec<u8> {
        got.get(&channel).cloned().unwrap_or_default()
    };
    while text(&got, 0).len() < 7 || !text(&got, 3).ends_with(b"refused") {
        match client.next().await {
            Some(Message::Binary(data)) => got.entry(data[0]).or_default().extend(&data[1..]),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text(&got, 0), b"\x50\0SHOUT");
    assert_eq!(text(&got, 1), b"\x50\0");
    assert_eq!(text(&got, 2), b"\x51\0");
    assert!(text(&got, 3).starts_with(b"\x51\0error forwarding port 81"));
}

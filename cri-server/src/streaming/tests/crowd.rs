//! More clients than there are places for.

use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::spdy::Client;
use super::{exec, http, server, soon};
use crate::streaming::Streaming;
use crate::streaming::hostile::Pods;
use crate::streaming::server::PLACES;

const V4: &str = "v4.channel.k8s.io";
/// What a silent client has, and less than all of them together would take.
const SILENCE: Duration = Duration::from_secs(2);

fn address(server: &Streaming) -> String {
    server.base.strip_prefix("http://").unwrap().to_owned()
}

async fn silent(server: &Streaming, count: usize) -> Vec<TcpStream> {
    let address = address(server);
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(soon(TcpStream::connect(&address)).await.unwrap());
    }
    clients
}

/// Runs a command that succeeds.
async fn runs(url: &str) {
    let mut client = Client::new(http::spdy(url, V4).await);
    let error = client.open("error").await;
    let stdout = client.open("stdout").await;
    let all = client.rest().await;
    assert_eq!(all.text(stdout), "out");
    assert!(all.text(error).contains("Success"), "{all:?}");
}

#[tokio::test]
async fn clients_that_say_nothing_keep_nobody_out() {
    let server = server(&Pods::default()).await;
    let mut crowd = silent(&server, PLACES + 44).await;
    let begun = Instant::now();
    runs(&server.exec(exec(&["exit", "0"], "o")).unwrap()).await;
    let took = begun.elapsed();
    // Not because the others had had their time.
    assert!(took < SILENCE, "it waited for {took:?}");
    // Those who came first had to go.
    assert_eq!(soon(crowd[0].read(&mut [0])).await.unwrap(), 0);
    let last = crowd.last_mut().unwrap();
    let is_open = tokio::time::timeout(Duration::from_millis(1), last.read(&mut [0])).await;
    assert!(
        begun.elapsed() > SILENCE || is_open.is_err(),
        "the last went"
    );
}

#[tokio::test]
async fn a_client_that_says_nothing_is_not_waited_for() {
    let server = server(&Pods::default()).await;
    let begun = Instant::now();
    let mut client = silent(&server, 1).await.remove(0);
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    let took = begun.elapsed();
    assert!(took >= SILENCE && took < 2 * SILENCE, "{took:?}");
}

#[tokio::test]
async fn more_clients_at_once_than_there_are_places_are_all_served() {
    let server = server(&Pods::default()).await;
    let mut clients = JoinSet::new();
    for _ in 0..PLACES + 44 {
        let url = server.exec(exec(&["exit", "0"], "o")).unwrap();
        clients.spawn(async move { runs(&url).await });
    }
    while let Some(served) = soon(clients.join_next()).await {
        served.unwrap();
    }
}

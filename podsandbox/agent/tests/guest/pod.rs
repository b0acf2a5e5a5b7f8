//! The pod around its containers: limits, size, network, mode.

use agent_api::{Dns, UpdateContainerRequest};
use serde_json::json;
use vmm_client::UmlMode;

use crate::FOREVER;
use crate::harness::{Container, Guest, Image, Options, artifacts, configuration};
use crate::network;

#[tokio::test]
async fn limits_hold_and_an_oom_kill_is_told() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let root = guest.attach(&Image::busybox()).await;
    let limits = json!({ "memory": { "limit": 33_554_432 }, "pids": { "limit": 50 },
                         "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000 } });
    let eat = Container::sh("eat", &root, "tail /dev/zero");
    let (exit, _) = guest
        .run_to_end(eat.set("/linux/resources", limits.clone()))
        .await;
    assert!(exit.oom_killed && exit.code == 137, "{exit:?}");

    let root = guest.attach(&Image::busybox()).await;
    let calm = Container::sh("calm", &root, FOREVER).set("/linux/resources", limits);
    guest.run(calm).await;
    let read = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight memory.oom.group";
    let text = guest
        .exec("calm", &["sh", "-c", read])
        .await
        .unwrap()
        .text();
    assert_eq!(text, "33554432\n50\n50000 100000\n100\n1\n");
    let resources = json!({ "memory": { "limit": 67_108_864 }, "cpu": { "quota": -1 } });
    let update = UpdateContainerRequest {
        id: "calm".into(),
        resources: resources.to_string().into_bytes(),
        oom_score_adj: Some(321),
    };
    guest.agent.update_container(update).await.unwrap();
    let text = guest
        .exec("calm", &["sh", "-c", read])
        .await
        .unwrap()
        .text();
    assert_eq!(text, "67108864\n50\nmax 100000\n100\n1\n");
    let scores = "for p in $(cat /sys/fs/cgroup/cgroup.procs) self; do cat /proc/$p/oom_score_adj; done | sort -u";
    let text = guest.exec("calm", &["sh", "-c", scores]).await;
    assert_eq!(text.unwrap().text(), "321\n");

    let write = "head -c 5000000 /dev/zero > /file; sync";
    guest.exec("calm", &["sh", "-c", write]).await.unwrap();
    let stats = guest.stats().await;
    let calm = stats
        .containers
        .iter()
        .find(|stats| stats.id == "calm")
        .unwrap();
    assert!(calm.cpu_usage_nanos > 0 && calm.pids >= 1, "{calm:?}");
    assert!(
        calm.memory_working_set_bytes > 0
            && calm.memory_working_set_bytes <= calm.memory_usage_bytes
    );
    assert_eq!(calm.memory_limit_bytes, 67_108_864);
    assert!(
        (5_000_000..6_000_000).contains(&calm.fs_used_bytes),
        "{calm:?}"
    );
    let of_guest = stats.guest.unwrap();
    println!(
        "agent RSS with two containers: {} KiB",
        of_guest.agent_rss_bytes / 1024
    );
    assert!(of_guest.memory_total_bytes > of_guest.memory_available_bytes);
    guest.shut_down().await;
}

#[tokio::test]
async fn the_idle_agent_is_small() {
    let Some(artifacts) = artifacts() else { return };
    let mut guest = Guest::boot(&artifacts).await;
    let stats = guest.stats().await;
    let rss = stats.guest.unwrap().agent_rss_bytes;
    println!("idle agent RSS: {} KiB", rss / 1024);
    assert!(rss <= 6 << 20, "{rss}");
    guest.shut_down().await;
}

#[tokio::test]
async fn the_pod_has_its_address_and_routes() {
    let Some(artifacts) = artifacts() else { return };
    let network = network::Network::create();
    let tap = network.tap();
    let options = Options {
        network: Some((tap, network::MAC)),
        ..Options::default()
    };
    let mut guest = Guest::start(&artifacts, options).await;
    let mut pod = configuration();
    pod.interface = Some(network::interface());
    pod.dns = Some(Dns {
        servers: vec!["10.231.8.1".into()],
        ..Dns::default()
    });
    pod.sysctls = [("net.ipv4.conf.eth0.arp_notify".into(), "1".into())].into();
    guest.configure(pod).await;
    let root = guest.attach(&Image::busybox()).await;
    let script = "ip addr show eth0; ip route; ip -6 route; cat /etc/hosts /etc/resolv.conf; \
                  cat /proc/sys/net/ipv4/conf/eth0/arp_notify; ping -c 1 -W 5 10.231.8.1; \
                  ping -c 1 -W 5 fd07:231::1; ping -c 1 -W 5 127.0.0.1";
    let (exit, output) = guest.run_to_end(Container::sh("net", &root, script)).await;
    assert_eq!(exit.code, 0, "{output}");
    for expected in [
        "link/ether 02:d7:00:00:01:01",
        "mtu 1400",
        "inet 10.231.8.5/24",
        "inet6 fd07:231::5/64",
        "default via 10.231.8.1 dev eth0",
        "192.0.2.1 dev eth0 scope link",
        "198.51.100.0/24 via 192.0.2.1",
        "default via fd07:231::1",
        "10.231.8.5\ttest-pod\nfd07:231::5\ttest-pod\n",
        "nameserver 10.231.8.1\n1\n",
    ] {
        assert!(output.contains(expected), "{expected}:\n{output}");
    }
    assert_eq!(output.matches(" 0% packet loss").count(), 3, "{output}");
    network.ping("10.231.8.5");
    let stats = guest.stats().await;
    let nic = stats
        .guest
        .unwrap()
        .interfaces
        .into_iter()
        .find(|nic| nic.name == "eth0")
        .unwrap();
    assert!(nic.rx_bytes > 0 && nic.tx_bytes > 0, "{nic:?}");
    guest.shut_down().await;
}

#[tokio::test]
async fn ptrace_mode_works_as_well() {
    let Some(artifacts) = artifacts() else { return };
    let options = Options {
        mode: UmlMode::Ptrace,
        ..Options::default()
    };
    let mut guest = Guest::start(&artifacts, options).await;
    guest.configure(configuration()).await;
    let root = guest.attach(&Image::busybox()).await;
    guest.run(Container::sh("slow", &root, FOREVER)).await;
    for _ in 0..3 {
        assert_eq!(
            guest.exec("slow", &["echo", "hi"]).await.unwrap().text(),
            "hi\n"
        );
    }
    guest.remove("slow").await;
    guest.shut_down().await;
}

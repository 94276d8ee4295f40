//! An engine on another machine: the proxy runs in a network namespace of its own, from which this machine is another one.
//!
//! A stranger's server listens in that namespace on every port that the containers publish here, at its loopback and at an
//! address that belongs to both machines. Needs root, `ip` (iproute2) and `nsenter` (util-linux).

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command as Blocking, Stdio},
    time::Duration,
};

use tokio::process::{Child, Command};

use crate::support::{
    client,
    engine::{self, Lab, run},
    forwarder::{Forwarder, five_gets},
    proxy::free_port,
    wait::eventually,
};

/// RFC 2544 reserves these for tests; the second engines take others of them.
const HERE: Ipv4Addr = Ipv4Addr::new(198, 19, 255, 253);
const THERE: Ipv4Addr = Ipv4Addr::new(198, 19, 255, 254);
/// An address of both machines, as that of docker's first bridge is.
const OF_BOTH: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

#[tokio::test]
async fn an_engine_on_another_machine_never_leads_to_a_stranger_on_this_one() {
    let Some(lab) = engine::shared("elsewhere").await else { return };
    let machine = Machine::start(&lab).await;
    let forwarder = Forwarder::tcp_at(HERE, five_gets).await;
    let ports: [u16; 4] = std::array::from_fn(|_| free_port());
    let [on_all, on_loopback, on_other, in_host] = ports;
    let strangers: Vec<Child> = ports.iter().map(|port| machine.stranger(&lab, *port)).collect();
    for port in ports {
        let answers = async || client::get(SocketAddr::from((THERE, port)), "/v1/models").await.ok();
        eventually("the stranger answers", Duration::from_secs(10), answers).await;
    }
    let publish = |address: &str, port: u16| format!("--publish={address}:{port}:8000");
    let all = lab.backend("all").run_arg(&publish("0.0.0.0", on_all)).label("inference.network", "nowhere");
    let all = all.start().await;
    let loopback = lab.backend("loopback").run_arg(&publish("127.0.0.1", on_loopback)).start().await;
    let other = lab.backend("other").run_arg(&publish(&OF_BOTH.to_string(), on_other)).start().await;
    let unpublished = lab.backend("unpublished").start().await;
    let host = lab.backend("host").run_arg("--network=host").port(in_host);
    let host = host.label("inference.port", &in_host.to_string()).start().await;

    let addr = SocketAddr::from((THERE, free_port()));
    let proxy = lab.proxy().env("DOCKER_HOST", forwarder.docker_host());
    let proxy = proxy.with(machine.command(lab.binary()), addr).ready().await;
    for reached in [&all, &host] {
        proxy.until_serves(reached.model()).await;
    }
    proxy.until_reported(&all.name, &["has no effect"]).await;
    for (backend, why) in [
        (&loopback, "on the loopback of that machine only"),
        (&other, "is published there on 198.51.100.7 only"),
        (&unpublished, "is not published there"),
    ] {
        let told = proxy.until_reported(&backend.name, &[why]).await;
        assert!(told.contains("-p 8000:8000") && told.contains("198.19.255.253"), "{told}");
        assert!(!proxy.lists(backend.model()).await, "{}", backend.name);
    }
    assert!(!proxy.lists("stranger").await, "a stranger is routed");
    drop(strangers);
}

/// Another machine, linked to this one by a pair of veth.
struct Machine {
    namespace: String,
}

// === impl Machine ===

impl Machine {
    async fn start(lab: &Lab) -> Self {
        let machine = Self { namespace: lab.name("machine") };
        // A run that was killed may have left its link behind.
        let _ = Blocking::new("ip").args(["link", "del", "iptelse0"]).output();
        let namespace = &machine.namespace;
        for line in [
            format!("netns add {namespace}"),
            format!("link add iptelse0 type veth peer name iptelse1 netns {namespace}"),
            format!("addr add {HERE}/30 dev iptelse0"),
            // It goes with the link.
            format!("addr add {OF_BOTH}/32 dev iptelse0"),
            "link set iptelse0 up".to_owned(),
            format!("-n {namespace} addr add {THERE}/30 dev iptelse1"),
            format!("-n {namespace} link set iptelse1 up"),
            format!("-n {namespace} link set lo up"),
            format!("-n {namespace} addr add {OF_BOTH}/32 dev lo"),
        ] {
            let mut command = Command::new("ip");
            command.args(line.split(' '));
            run(command, "").await.unwrap_or_else(|error| panic!("{error} (needs root and iproute2)"));
        }
        machine
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg(program);
        command
    }

    /// A server that is none of the engine's, at every address of this machine.
    fn stranger(&self, lab: &Lab, port: u16) -> Child {
        let mut command = self.command(lab.binary());
        command.args(["demo-backend", "--name", "stranger", "--model", "stranger", "--port", &port.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        command.spawn().unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The pair of links goes with one of them, at once; a namespace stays as long as a process is in it.
        for args in [["link", "del", "iptelse0"], ["netns", "del", &self.namespace]] {
            let _ = Blocking::new("ip").args(args).stdin(Stdio::null()).output();
        }
    }
}

//! Transfers over a simulated network that loses, duplicates and delays: the client has exactly the bytes, or a clear
//! failure.
#![allow(clippy::unwrap_used)]

use kiln_netboot::tftp::{Action, Ending, Limits, Request, Transfer};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);

fn peer() -> SocketAddr {
    "10.77.0.9:2000".parse().unwrap()
}

fn request(options: &[(&str, &str)]) -> Request {
    let mut packet = b"\0\x01b/x\0octet\0".to_vec();
    for (name, value) in options {
        packet.extend(format!("{name}\0{value}\0").bytes());
    }
    Request::parse(&packet).unwrap()
}

fn ack(number: u16) -> Vec<u8> {
    [&[0, 4][..], &number.to_be_bytes()].concat()
}

fn blocks(actions: &[Action]) -> Vec<u16> {
    actions.iter().filter_map(|a| if let Action::Block { number, .. } = a { Some(*number) } else { None }).collect()
}

fn start(options: &[(&str, &str)], size: u64) -> (Transfer, Vec<Action>) {
    Transfer::start(&request(options), peer(), size, Limits::default(), Duration::ZERO)
}

/// An RFC 1350 / 7440 client. It never knows more than the packets it got.
struct Client {
    file: Vec<u8>,
    blksize: usize,
    window: u64,
    /// Blocks had in order.
    have: u64,
    /// Of them, acknowledged.
    acked: u64,
    complete: bool,
    failed: bool,
}

impl Client {
    fn packet(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        let number = u16::from_be_bytes([packet[2], packet[3]]);
        match packet[1] {
            6 => (self.have == 0).then(|| ack(0)),
            5 => {
                self.failed = true;
                None
            }
            3 => {
                let ahead = number.wrapping_sub((self.have & 0xffff) as u16);
                if ahead == 1 && !self.complete {
                    self.have += 1;
                    self.file.extend(&packet[4..]);
                    self.complete = packet.len() - 4 < self.blksize;
                    let due = self.complete || self.have - self.acked >= self.window;
                    return due.then(|| self.acknowledge());
                }
                // A gap or a repeat: say where it stands (RFC 7440 §4; RFC 1350 for a window of one).
                Some(self.acknowledge())
            }
            other => panic!("opcode {other}"),
        }
    }

    fn acknowledge(&mut self) -> Vec<u8> {
        self.acked = self.have;
        ack((self.have & 0xffff) as u16)
    }
}

/// What the network does with the next packet, from a list that repeats.
#[derive(Debug, Clone)]
struct Fate {
    copies: u8,
    delay_ms: u64,
}

struct Run {
    ending: Ending,
    client: Client,
    datagrams: u64,
    took: Duration,
}

/// Runs server, network and client until the server ends; `silent_after` cuts the client off.
fn run(data: &[u8], options: &[(&str, &str)], fates: &[Fate], silent_after: Option<u64>) -> Run {
    let get = |name| options.iter().find(|(n, _)| *n == name).and_then(|(_, v)| v.parse::<u64>().ok());
    let mut client = Client {
        file: Vec::new(),
        blksize: get("blksize").map_or(512, |n| usize::try_from(n.min(1468)).unwrap()),
        window: get("windowsize").map_or(1, |n| n.min(16)),
        have: 0,
        acked: 0,
        complete: false,
        failed: false,
    };
    let (mut transfer, mut actions) =
        Transfer::start(&request(options), peer(), data.len() as u64, Limits::default(), Duration::ZERO);
    let mut wire: BTreeMap<(Duration, u64), (bool, Vec<u8>)> = BTreeMap::new();
    let (mut now, mut serial, mut datagrams) = (Duration::ZERO, 0u64, 0);
    let mut client_resends_at = now + 3000 * MS;
    let mut put = |wire: &mut BTreeMap<_, _>, now: Duration, to_client: bool, packet: Vec<u8>| {
        let fate = &fates[usize::try_from(serial).unwrap() % fates.len()];
        for copy in 0..fate.copies {
            serial += 1;
            let at = now + MS * u32::try_from(1 + fate.delay_ms * (1 + u64::from(copy))).unwrap();
            wire.insert((at, serial), (to_client, packet.clone()));
        }
        serial += 1;
    };
    loop {
        for action in std::mem::take(&mut actions) {
            match action {
                Action::Send(packet) => put(&mut wire, now, true, packet),
                Action::Block { number, start, end } => {
                    datagrams += 1;
                    let mut packet = Action::data_header(number).to_vec();
                    packet.extend(&data[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]);
                    put(&mut wire, now, true, packet);
                }
                Action::Refuse(..) => panic!("no stranger here"),
                Action::End(ending) => return Run { ending, client, datagrams, took: now },
            }
        }
        let arrives = wire.keys().next().map(|(at, _)| *at);
        let timer = transfer.deadline().unwrap();
        let next = arrives.unwrap_or(Duration::MAX).min(timer).min(client_resends_at);
        now = next;
        let gone = silent_after.is_some_and(|n| client.have >= n);
        if Some(next) == arrives {
            let ((_, _), (to_client, packet)) = wire.pop_first().unwrap();
            if !to_client {
                actions = transfer.packet(now, peer(), &packet);
            } else if !gone {
                client_resends_at = now + 3000 * MS;
                if let Some(reply) = client.packet(&packet) {
                    put(&mut wire, now, false, reply);
                }
            }
        } else if next == timer {
            actions = transfer.tick(now);
        } else {
            client_resends_at = now + 3000 * MS;
            if !gone && client.have > 0 {
                let again = client.acknowledge();
                put(&mut wire, now, false, again);
            }
        }
    }
}

fn data(size: usize) -> Vec<u8> {
    (0..size).map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap()).collect()
}

fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = (prop_oneof![5 => Just(1u8), 1 => Just(0), 1 => Just(2)], prop_oneof![4 => Just(0u64), 1 => 1u64..400])
        .prop_map(|(copies, delay_ms)| Fate { copies, delay_ms });
    prop::collection::vec(fate, 7..60)
}

proptest! {
    #[test]
    fn a_bad_network_costs_time_never_bytes(
        size in 0usize..30_000,
        blksize in prop_oneof![Just("512"), Just("1024"), Just("1468"), Just("65464")],
        window in 1u16..20,
        fates in fates(),
    ) {
        let data = data(size);
        let window = window.to_string();
        let run = run(&data, &[("blksize", blksize), ("windowsize", &window), ("tsize", "0")], &fates, None);
        match run.ending {
            Ending::Done => {
                prop_assert!(run.client.complete);
                prop_assert!(run.client.file == data);
            }
            Ending::Stalled { .. } | Ending::TooSlow { .. } => {
                // Given up: what the client has is a prefix, and it can tell (no short block, or the last ACK was
                // lost).
                prop_assert!(data.starts_with(&run.client.file));
                prop_assert!(!run.client.complete || run.client.file == data);
                prop_assert!(run.took >= Duration::from_secs(30));
            }
            Ending::Probed | Ending::Aborted { .. } => prop_assert!(false, "{:?}", run.ending),
        }
    }

    /// Every packet doubled: a server that answers each ACK would double its traffic with each round (RFC 1123
    /// §4.2.3.1).
    #[test]
    fn doubled_packets_do_not_breed(window in 1u16..17, delay_ms in 0u64..3) {
        let data = data(200_000);
        let window = window.to_string();
        let run = run(&data, &[("windowsize", &window)], &[Fate { copies: 2, delay_ms }], None);
        prop_assert_eq!(run.ending, Ending::Done);
        prop_assert!(run.client.file == data);
        prop_assert!(run.datagrams <= 2 * 391 + 80, "{} datagrams for 391 blocks", run.datagrams);
    }
}

#[test]
fn a_clean_network_gets_each_block_once() {
    for size in [0, 1, 511, 512, 513, 5120, 100_000] {
        let data = data(size);
        for options in [&[][..], &[("tsize", "0")], &[("blksize", "1468"), ("windowsize", "4"), ("tsize", "0")]] {
            let run = run(&data, options, &[Fate { copies: 1, delay_ms: 0 }], None);
            assert_eq!(run.ending, Ending::Done);
            assert!(run.client.file == data, "{size} {options:?}");
            assert_eq!(run.datagrams, (size / run.client.blksize) as u64 + 1);
            assert!(run.took < Duration::from_secs(1));
        }
    }
}

#[test]
fn the_block_number_goes_round_past_65535() {
    let data = data(512 * 70_000 + 3);
    let run = run(&data, &[("windowsize", "16")], &[Fate { copies: 1, delay_ms: 0 }], None);
    assert_eq!(run.ending, Ending::Done);
    assert!(run.client.file == data);
}

#[test]
fn a_client_that_falls_silent_is_given_up_in_bounded_time() {
    let fates = [Fate { copies: 1, delay_ms: 0 }];
    let gone = run(&data(100_000), &[], &fates, Some(10));
    assert_eq!(gone.ending, Ending::Stalled { acknowledged: 5120 });
    assert!((30..=31).contains(&gone.took.as_secs()), "{:?}", gone.took);
    assert!(gone.datagrams < 11 + 15, "{} datagrams: the pauses double", gone.datagrams);
    let slow = run(&data(500_000), &[], &[Fate { copies: 1, delay_ms: 300 }], None);
    assert!(matches!(slow.ending, Ending::TooSlow { .. }), "{:?}", slow.ending);
}

#[test]
fn options_are_answered_within_the_limits() {
    let (_, actions) =
        start(&[("blksize", "65464"), ("tsize", "0"), ("timeout", "3"), ("windowsize", "64"), ("x", "1")], 5000);
    let oack = b"\0\x06blksize\x001468\0tsize\x005000\0timeout\x003\0windowsize\x0016\0".to_vec();
    assert_eq!(actions, [Action::Send(oack)]);
    let (_, actions) = start(&[], 5000);
    assert_eq!(actions, [Action::Block { number: 1, start: 0, end: 512 }], "no options, no OACK");
}

#[test]
fn the_size_probe_of_pxe_roms_ends_in_silence() {
    let (mut transfer, _) = start(&[("tsize", "0")], 5000);
    assert_eq!(transfer.packet(MS, peer(), b"\0\x05\0\x08User aborted\0"), [Action::End(Ending::Probed)]);
    assert_eq!((transfer.deadline(), transfer.tick(99_000 * MS)), (None, vec![]));
}

#[test]
fn an_error_in_mid_transfer_is_told_with_its_text() {
    let (mut transfer, _) = start(&[], 5000);
    transfer.packet(MS, peer(), &ack(1));
    assert_eq!(
        transfer.packet(MS, peer(), b"\0\x05\0\x03disk\nfull\0"),
        [Action::End(Ending::Aborted { code: 3, text: "disk?full".into() })]
    );
}

#[test]
fn a_stranger_is_told_and_changes_nothing() {
    let stranger: SocketAddr = "10.77.0.66:2000".parse().unwrap();
    let (mut transfer, _) = start(&[], 5000);
    let refused = transfer.packet(MS, stranger, &ack(1));
    assert!(matches!(&refused[..], [Action::Refuse(to, p)] if *to == stranger && p[..4] == [0, 5, 0, 5]));
    assert_eq!(transfer.packet(MS, stranger, b"\0\x05\0\0\0"), [], "an ERROR is never answered");
    assert_eq!(blocks(&transfer.packet(MS, peer(), &ack(1))), [2]);
}

#[test]
fn duplicate_and_impossible_acks() {
    let (mut transfer, _) = start(&[], 5000);
    assert_eq!(blocks(&transfer.packet(MS, peer(), &ack(1))), [2]);
    assert_eq!(transfer.packet(MS, peer(), &ack(1)), [], "Sorcerer's Apprentice");
    assert_eq!(transfer.packet(MS, peer(), &ack(7)), [], "not sent yet");
    assert_eq!(blocks(&transfer.packet(MS, peer(), &ack(2))), [3]);

    // With a window, an ACK of less than the window says what was lost: sent again once, then the timer decides.
    let (mut transfer, _) = start(&[("windowsize", "4")], 50_000);
    assert_eq!(blocks(&transfer.packet(MS, peer(), &ack(0))), [1, 2, 3, 4]);
    assert_eq!(blocks(&transfer.packet(3 * MS, peer(), &ack(2))), [3, 4, 5, 6], "from the gap on");
    assert_eq!(transfer.packet(9 * MS, peer(), &ack(2)), []);
    assert_eq!(blocks(&transfer.packet(9 * MS, peer(), &ack(3))), [7], "what goes on while that is out is only new");
    let at = transfer.deadline().unwrap();
    assert_eq!(blocks(&transfer.tick(at)), [4, 5, 6, 7]);
    assert_eq!(transfer.tick(at), []);
    assert_eq!(blocks(&transfer.packet(at, peer(), &ack(7))), [8, 9, 10, 11]);
    assert_eq!(blocks(&transfer.packet(at + 9 * MS, peer(), &ack(7))), [8, 9, 10, 11], "the first of a window");
}

#[test]
fn the_clients_timeout_is_kept_to() {
    let (mut transfer, _) = start(&[("timeout", "5")], 50_000);
    assert_eq!(transfer.deadline(), Some(5000 * MS));
    assert_eq!(transfer.tick(5000 * MS).len(), 1, "the OACK again");
    assert_eq!(transfer.deadline(), Some(10_000 * MS));
}

/// RFC 2349: a server may leave the option out of its OACK. Whatever is asked for, silence ends the transfer in 30 s.
#[test]
fn no_timeout_of_a_client_holds_a_transfer_longer() {
    for seconds in 1..=255u8 {
        let asked = seconds.to_string();
        let (mut transfer, actions) = start(&[("timeout", &asked), ("tsize", "0")], 50_000);
        let [Action::Send(oack)] = &actions[..] else { panic!("{actions:?}") };
        let granted = oack.windows(8).any(|w| w == b"timeout\0");
        assert_eq!(granted, seconds <= 10, "{seconds}");
        let mut sends = 1;
        let ended = loop {
            let at = transfer.deadline().unwrap();
            match &transfer.tick(at)[..] {
                [Action::Send(_)] => sends += 1,
                [Action::Send(_), Action::End(Ending::Stalled { acknowledged: 0 })] => break at,
                other => panic!("{seconds}: {other:?}"),
            }
        };
        assert_eq!(ended, 30_000 * MS, "{seconds}");
        assert!((3..=30).contains(&sends), "{seconds}: {sends} sends");
    }
}

//! `cargo bench --bench prefix [-- savings|costs]`: what affinity saves on conversations, against other policies, and what it costs. The
//! tables are those of `docs/prefix.md`.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed benchmark")]

mod conversations;

use std::{hint::black_box, time::Instant};

use conversations::{Mix, Policy};
use inference_proxy::{
    data::affinity::{Affinity, Candidate, Preference},
    wire::scan::{ModelScanner, PromptSeed},
};

/// Conversations as a handful of applications have them, on replicas that are half busy.
const MIX: Mix = Mix {
    replicas: 4,
    cache_bytes: 4_000_000,
    applications: 12,
    conversations: 1_200,
    turns: 6.0,
    between_s: 1.0,
    think_s: 20.0,
    prefill_bytes_per_s: 40_000.0,
    decode_bytes_per_s: 250.0,
    system_bytes_max: 20_000,
    document_in: 10,
};

fn main() {
    // Cargo passes words of its own beside those behind `--`.
    let wanted = |part: &str| !std::env::args().any(|word| matches!(&*word, "savings" | "costs") && word != part);
    if wanted("savings") {
        savings();
    }
    if wanted("costs") {
        costs();
    }
}

fn savings() {
    let small = Mix { cache_bytes: 1_000_000, ..MIX };
    let mixes = [
        ("4 replicas", MIX),
        ("8 replicas", Mix { replicas: 8, conversations: 2_400, between_s: 0.5, ..MIX }),
        ("16 replicas", Mix { replicas: 16, conversations: 4_800, between_s: 0.25, ..MIX }),
        ("4 replicas, little cache", small),
        (
            "16 replicas, little cache, 40 applications",
            Mix { replicas: 16, applications: 40, conversations: 4_800, between_s: 0.25, ..small },
        ),
        ("4 replicas, hardly busy", Mix { between_s: 20.0, ..MIX }),
        (
            "4 replicas, long agents' turns",
            Mix { conversations: 300, turns: 25.0, think_s: 2.0, between_s: 8.0, system_bytes_max: 80_000, ..MIX },
        ),
        ("4 replicas, single questions", Mix { turns: 1.2, between_s: 0.2, conversations: 4_000, ..MIX }),
    ];
    println!(
        "| mix | policy | prompt bytes not computed | later turns that stay | most requests / mean | most in flight / mean | first byte, mean | p95 |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for (name, mix) in mixes {
        for policy in [Policy::RoundRobin, Policy::Least, Policy::Prefix, Policy::Oracle] {
            let of = mix.run(policy, 1);
            println!(
                "| {name} | {policy:?} | {:.1} % | {:.1} % | {:.2} | {:.2} | {:.0} ms | {:.0} ms |",
                100.0 * of.cached_bytes as f64 / of.prompt_bytes as f64,
                100.0 * of.stayed,
                of.max_requests,
                of.max_in_flight,
                1e3 * of.first_byte_mean_s,
                1e3 * of.first_byte_p95_s,
            );
        }
    }
}

fn costs() {
    println!("\n| what | measured |\n|---|---:|");
    for (name, body) in
        [("one long text", one_text(200_000)), ("80 messages", messages(80, 2_500)), ("1 KB", messages(3, 250))]
    {
        let kib = body.len() as f64 / 1024.0;
        let scan = |marking: bool| {
            nanos(|| {
                let mut scanner = ModelScanner::json();
                if marking {
                    scanner.mark_prompt(PromptSeed::new(1));
                }
                for chunk in body.as_bytes().chunks(16 * 1024) {
                    scanner.feed(black_box(chunk)).unwrap();
                }
                scanner.finish().unwrap();
                if marking {
                    black_box(scanner.take_prompt("m"));
                }
                black_box(scanner.model());
            })
        };
        let (plain, marking) = (scan(false), scan(true));
        println!(
            "| scanning {kib:.0} KiB, {name} | {plain:.0} ns, {:.1} ns per KiB |\n| the same with marks | {marking:.0} ns, {:.1} ns per KiB |",
            plain / kib,
            marking / kib
        );
    }
    let affinity = Affinity::new(PromptSeed::new(1));
    let mut next = 0;
    let mut prompt = |turns: usize| {
        next += 1;
        let mut scanner = ModelScanner::json();
        scanner.mark_prompt(PromptSeed::new(1));
        let body = messages(turns, 400).replace("text 0", &format!("text {next}"));
        scanner.feed(body.as_bytes()).unwrap();
        scanner.take_prompt("m").unwrap()
    };
    for replicas in [1, 8, 64, 1_000] {
        let pool =
            || (0..replicas).map(|index| Candidate { index, replica: index as u32 + 1, in_flight: 0, weight: 1 });
        let (known, unknown) = (prompt(30), prompt(30));
        affinity.learn(&known, 1);
        let at = |prompt| match affinity.prefer(black_box(prompt), pool()) {
            Preference::At { index, .. } => index,
            Preference::Spread(_) => usize::MAX,
        };
        println!(
            "| choosing among {replicas}, {} marks, known / not known | {:.0} / {:.0} ns |",
            known.marks().count(),
            nanos(|| _ = black_box(at(&known))),
            nanos(|| _ = black_box(at(&unknown))),
        );
    }
    let known = prompt(30);
    println!("| learning {} marks | {:.0} ns |", known.marks().count(), nanos(|| affinity.learn(black_box(&known), 2)));
    for n in 0..4_000 {
        affinity.learn(&prompt(30), 1 + n % 4);
    }
    let mut generation = 1;
    affinity.follow(generation, 1..=5);
    let forget = nanos(|| {
        generation += 1;
        // One that has nothing goes and comes.
        affinity.follow(generation, 1..=5 - (generation % 2) as u32);
    });
    println!("| a replica goes, of {} prefixes | {:.0} µs |", affinity.len(), 2.0 * forget / 1e3);
}

/// The least of several rounds, as whatever else runs only adds.
fn nanos(mut act: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..25 {
        let begin = Instant::now();
        let mut rounds = 0;
        while begin.elapsed().as_millis() < 8 {
            act();
            rounds += 1;
        }
        best = best.min(begin.elapsed().as_nanos() as f64 / f64::from(rounds));
    }
    best
}

fn one_text(bytes: usize) -> String {
    format!(r#"{{"model":"m","prompt":"{}"}}"#, "some words of text ".repeat(bytes / 19))
}

fn messages(count: usize, bytes: usize) -> String {
    let message =
        |i: usize| format!(r#"{{"role":"user","content":"text {i}: {}"}}"#, "a few words, ".repeat(bytes / 13));
    format!(r#"{{"messages":[{}],"model":"m"}}"#, (0..count).map(message).collect::<Vec<_>>().join(","))
}

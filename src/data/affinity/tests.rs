use serde_json::{Value, json};

use super::*;
use crate::wire::scan::{ModelScanner, PromptSeed};

/// The prompt of a body for model `m`.
fn prompt(body: &Value) -> Prompt {
    let mut scanner = ModelScanner::json();
    scanner.mark_prompt(PromptSeed::new(7));
    scanner.feed(body.to_string().as_bytes()).unwrap();
    scanner.take_prompt("m").unwrap()
}

/// The prompt of a turn of a conversation.
fn turn(system: &str, conversation: usize, turns: usize) -> Prompt {
    let mut messages = vec![json!({"role": "system", "content": system})];
    for turn in 0..turns {
        messages.push(json!({"role": "user", "content": format!("{conversation} asks {turn}")}));
        messages.push(json!({"role": "assistant", "content": format!("{conversation} is told {turn}")}));
    }
    messages.pop();
    prompt(&json!({"messages": messages}))
}

/// Idle replicas 1, 2, ... of weight 1.
fn pool(loads: &[u64]) -> Vec<Candidate> {
    let one = |(index, &in_flight): (usize, &u64)| Candidate { index, replica: index as u32 + 1, in_flight, weight: 1 };
    loads.iter().enumerate().map(one).collect()
}

fn prefer<'a>(affinity: &'a Affinity, prompt: &Prompt, pool: &[Candidate]) -> Preference<'a> {
    affinity.prefer(prompt, pool.iter().copied())
}

fn at(affinity: &Affinity, prompt: &Prompt, pool: &[Candidate]) -> Option<usize> {
    match prefer(affinity, prompt, pool) {
        Preference::At { index, .. } => Some(index),
        Preference::Spread(_) => None,
    }
}

/// The places that something new may go to.
fn allowed(affinity: &Affinity, prompt: &Prompt, pool: &[Candidate]) -> Vec<usize> {
    match prefer(affinity, prompt, pool) {
        Preference::At { index, .. } => panic!("at {index}"),
        Preference::Spread(spread) => pool.iter().filter(|one| spread.allows(one)).map(|one| one.index).collect(),
    }
}

#[test]
fn a_conversation_stays_where_it_is() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let idle = pool(&[0; 4]);
    assert_eq!(allowed(&affinity, &turn("You are.", 1, 1), &idle), [0, 1, 2, 3]);
    affinity.learn(&turn("You are.", 1, 1), 3);
    for turns in 2..9 {
        let now = turn("You are.", 1, turns);
        let Preference::At { index: 2, bytes } = prefer(&affinity, &now, &idle) else { panic!("turn {turns}") };
        let before = turn("You are.", 1, turns - 1);
        assert_eq!(bytes, before.bytes() - 1, "all of the turn before");
        affinity.learn(&now, 3);
    }
    // Also when it is the only one there is traffic from.
    assert_eq!(at(&affinity, &turn("You are.", 1, 9), &idle), Some(2));
}

#[test]
fn load_stands_above_a_match() {
    let affinity = Affinity::new(PromptSeed::new(7));
    affinity.learn(&turn("You are.", 1, 1), 1);
    let next = |affinity: &Affinity, loads: &[u64]| at(affinity, &turn("You are.", 1, 2), &pool(loads));
    for (loads, stays) in [
        (&[0, 0, 0, 0][..], true),
        (&[3, 0, 0, 0], true),
        (&[5, 0, 0, 0], false),
        (&[13, 10, 10, 10], true),
        (&[15, 10, 10, 10], false),
        (&[125, 100, 100, 100], true),
        (&[140, 100, 100, 100], false),
        // With nobody to compare there is no mean to be over.
        (&[1_000], true),
    ] {
        // Another memory for each, since a continuation counts.
        let affinity = Affinity::new(PromptSeed::new(7));
        affinity.learn(&turn("You are.", 1, 1), 1);
        assert_eq!(next(&affinity, loads) == Some(0), stays, "{loads:?}");
    }
    // Whoever gets it instead is the holder from then on.
    assert_eq!(next(&affinity, &[9, 0, 0, 0]), None);
    affinity.learn(&turn("You are.", 1, 2), 4);
    assert_eq!(at(&affinity, &turn("You are.", 1, 3), &pool(&[0; 4])), Some(3));
}

#[test]
fn weights_count() {
    let affinity = Affinity::new(PromptSeed::new(7));
    affinity.learn(&turn("You are.", 1, 1), 1);
    let weighted = |weight: u32, in_flight: u64| {
        let mut pool = pool(&[in_flight, 4, 4]);
        pool[0].weight = weight;
        pool
    };
    assert_eq!(at(&affinity, &turn("You are.", 1, 2), &weighted(1, 9)), None);
    assert_eq!(at(&affinity, &turn("You are.", 1, 2), &weighted(2, 9)), Some(0));
}

#[test]
fn a_shared_beginning_is_spread() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let system = "You are a helpful assistant. ".repeat(50);
    let mut counts = [0_u32; 4];
    for conversation in 0..200 {
        // One at a time, so that load tells nothing.
        let idle = pool(&[0; 4]);
        let first = turn(&system, conversation, 1);
        let index = match prefer(&affinity, &first, &idle) {
            Preference::At { index, .. } => index,
            Preference::Spread(spread) => idle.iter().position(|one| spread.allows(one)).unwrap(),
        };
        counts[index] += 1;
        affinity.learn(&first, index as u32 + 1);
        let mut last = index;
        for turns in 2..=3 {
            let next = turn(&system, conversation, turns);
            let index = at(&affinity, &next, &idle).unwrap();
            assert_eq!(index, last, "{conversation}");
            counts[index] += 1;
            affinity.learn(&next, index as u32 + 1);
            last = index;
        }
    }
    assert!(counts.iter().all(|count| (130..=190).contains(count)), "{counts:?}");
}

#[test]
fn one_prompt_over_and_over_is_shared_too() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let same = turn("You are.", 1, 1);
    let mut counts = [0_u32; 3];
    for _ in 0..300 {
        let idle = pool(&[0; 3]);
        let index = match prefer(&affinity, &same, &idle) {
            Preference::At { index, .. } => index,
            Preference::Spread(spread) => idle.iter().position(|one| spread.allows(one)).unwrap(),
        };
        counts[index] += 1;
        affinity.learn(&same, index as u32 + 1);
    }
    assert!(counts.iter().all(|count| (80..=125).contains(count)), "{counts:?}");
}

#[test]
fn a_newcomer_is_not_flooded() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let mut counts = [0_u32; 4];
    for conversation in 0..400 {
        let members = pool(if conversation < 200 { &[0; 3] } else { &[0; 4] });
        let first = turn("You are.", conversation, 1);
        let index = match prefer(&affinity, &first, &members) {
            Preference::At { index, .. } => index,
            Preference::Spread(spread) => members.iter().rposition(|one| spread.allows(one)).unwrap(),
        };
        if conversation >= 200 {
            counts[index] += 1;
        }
        affinity.learn(&first, index as u32 + 1);
        if conversation == 220 {
            assert!((4..=14).contains(&counts[3]), "{counts:?}");
        }
    }
    assert!(counts.iter().all(|count| (30..=80).contains(count)), "{counts:?}");
}

#[test]
fn names_help_where_marks_do_not() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let idle = pool(&[0; 4]);
    let named =
        |session: &str, text: &str| prompt(&json!({"messages": [{"content": text}], "prompt_cache_key": session}));
    affinity.learn(&named("a", "one"), 2);
    assert_eq!(at(&affinity, &named("a", "two"), &idle), Some(1));
    assert_eq!(at(&affinity, &named("b", "two"), &idle), None);
    assert_eq!(at(&affinity, &named("a", "two"), &pool(&[0, 9, 0, 0])), None, "load stands above it");
    // Of two holders of one prefix the one that has the conversation.
    let long = "the same text at the start of every one of them, at least a mark long";
    for (session, replica) in [("x", 1), ("y", 3), ("z", 4)] {
        affinity.learn(&named(session, long), replica);
    }
    assert_eq!(at(&affinity, &named("y", long), &pool(&[0, 0, 1, 0])), Some(2));
    // A name that is everybody's does not draw everybody.
    let by_user = |text: &str| prompt(&json!({"messages": [{"content": text}], "user": "app"}));
    affinity.learn(&by_user("one"), 2);
    assert_eq!(at(&affinity, &by_user("two"), &idle), None);
}

#[test]
fn the_longest_match_wins_and_a_shorter_one_is_next() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let system = "You are a helpful assistant. ".repeat(50);
    affinity.learn(&turn(&system, 1, 1), 2);
    affinity.learn(&turn(&system, 2, 1), 1);
    affinity.learn(&turn(&system, 2, 2), 1);
    let next = turn(&system, 2, 3);
    let Preference::At { index: 0, bytes } = prefer(&affinity, &next, &pool(&[0; 4])) else { panic!("not at 0") };
    assert!(bytes > system.len() as u32);
    // The other one that has the system prompt is better than those that have nothing.
    let Preference::At { index: 1, bytes } = prefer(&affinity, &next, &pool(&[9, 0, 0, 0])) else { panic!("not at 1") };
    assert!(bytes >= system.len() as u32 - 64);
}

#[test]
fn who_may_not_is_not_preferred() {
    let affinity = Affinity::new(PromptSeed::new(7));
    affinity.learn(&turn("You are.", 1, 1), 2);
    let mut rest = pool(&[0; 4]);
    rest.remove(1);
    assert_eq!(allowed(&affinity, &turn("You are.", 1, 2), &rest), [0, 2, 3]);
    assert!(matches!(prefer(&affinity, &turn("You are.", 1, 2), &[]), Preference::Spread(_)));
}

#[test]
fn entries_go_with_their_replica() {
    let affinity = Affinity::new(PromptSeed::new(7));
    for conversation in 0..50 {
        affinity.learn(&turn("You are.", conversation, 3), 1 + conversation as u32 % 2);
    }
    let all = affinity.len();
    affinity.follow(1, [1, 2, 3].into_iter());
    affinity.follow(1, [].into_iter());
    assert_eq!(affinity.len(), all, "the same table says nothing new");
    affinity.follow(3, [2, 3].into_iter());
    assert!(affinity.len() < all * 3 / 4 && !affinity.is_empty());
    assert_eq!(at(&affinity, &turn("You are.", 0, 4), &pool(&[0, 9])), None);
    let half = affinity.len();
    affinity.follow(2, [3].into_iter());
    assert_eq!(affinity.len(), half, "an older table is no news");
    affinity.follow(4, [].into_iter());
    assert!(affinity.is_empty());
}

#[test]
fn at_least_one_is_allowed_whatever_the_load() {
    let affinity = Affinity::new(PromptSeed::new(7));
    let mut rng = fastrand::Rng::with_seed(3);
    for round in 0..2_000 {
        let members: Vec<Candidate> = (0..rng.usize(1..9))
            .map(|index| Candidate {
                index,
                replica: index as u32 + 1,
                in_flight: rng.u64(0..30) * rng.u64(0..2),
                weight: rng.u32(1..5),
            })
            .collect();
        let new = turn("You are.", round, 1);
        let index = match prefer(&affinity, &new, &members) {
            Preference::At { index, .. } => index,
            Preference::Spread(spread) => members.iter().find(|one| spread.allows(one)).unwrap().index,
        };
        affinity.learn(&new, index as u32 + 1);
    }
}

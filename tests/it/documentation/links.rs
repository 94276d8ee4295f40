//! No link of a page leads to a file or a heading that is not there, and no path in code marks does.

use std::{
    collections::HashMap,
    fs,
    path::{Component, Path, PathBuf},
};

use super::page;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every page for people, by its path from the root.
fn pages() -> Vec<String> {
    let mut pages: Vec<String> = Vec::new();
    for folder in ["", "docs", "tests"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    pages.sort();
    pages
}

/// The lines outside of blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// The names by which headings can be linked to, as GitHub makes them: lower case, dashes for blanks, punctuation away.
/// A heading that stands there before gets a number.
fn anchors(text: &str) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let headings = prose(text).filter(|line| line.starts_with('#'));
    let titles = headings.map(|line| line.trim_start_matches('#').trim().to_lowercase());
    titles
        .map(|title| {
            let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let before = seen.entry(anchor.clone()).or_default();
            *before += 1;
            if *before == 1 { anchor } else { format!("{anchor}-{}", *before - 1) }
        })
        .collect()
}

/// The targets of links and pictures: `[text](target)`.
fn targets(text: &str) -> Vec<String> {
    // Code holds brackets that link to nothing; the text of a link may be code.
    let prose: Vec<&str> = prose(text).collect();
    let prose = prose.join("\n");
    prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned).collect()
}

/// `a/../b` is `b`.
fn plain(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut path, part| {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
        path
    })
}

/// What is wrong with the links of a page, which stands in `folder`.
fn broken(name: &str, text: &str) -> Vec<String> {
    let folder = Path::new(name).parent().unwrap();
    let mut found = Vec::new();
    for target in targets(text).iter().filter(|target| !target.contains("://")) {
        let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
        let file = if file.is_empty() { PathBuf::from(name) } else { plain(&folder.join(file)) };
        let path = root().join(&file);
        let is_own = file == Path::new(name);
        if !is_own && !path.exists() {
            found.push(format!("{name} links to {target}, which does not exist"));
        } else if !anchor.is_empty() {
            let there = if is_own { text.to_owned() } else { fs::read_to_string(path).unwrap() };
            if !anchors(&there).iter().any(|known| known == anchor) {
                found.push(format!("{name} links to {target}, a heading that does not exist"));
            }
        }
    }
    found
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let pages = pages();
    assert!(pages.len() > 10, "{pages:?}");
    let wrong: Vec<String> = pages.iter().flat_map(|name| broken(name, &page(name))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_link_to_nowhere_is_found() {
    for (text, is_broken) in [
        ("[x](configuration.md)", false),
        ("[x](configuration.md#labels) and [y](../README.md)", false),
        ("![x](status.png)", false),
        ("# Here\n[x](#here)", false),
        ("# Here: `a`, b-c\n[x](#here-a-b-c)", false),
        ("# A\n# A\n[x](#a-1)", false),
        ("[x](https://example.org/nothing#there)", false),
        ("```\n[x](nowhere.md)\n```", false),
        ("[x](nowhere.md)", true),
        ("[`x`](nowhere.md)", true),
        ("[x](configuration.md#nowhere)", true),
        ("[x](#nowhere)", true),
        ("```\n# Here\n```\n[x](#here)", true),
        ("[x](README.md)", true),
    ] {
        assert_eq!(!broken("docs/page.md", text).is_empty(), is_broken, "{text}");
    }
}

/// A reader begins with the README, so it must lead to every page.
#[test]
fn every_page_is_linked_from_the_readme() {
    let readme = targets(&page("README.md"));
    for name in pages().iter().filter(|name| name.starts_with("docs/") || !name.contains('/')) {
        let is_linked = readme.iter().any(|target| target.split('#').next() == Some(name));
        assert!(is_linked || name == "README.md", "the README has no link to {name}");
    }
}

#[test]
fn every_path_in_code_marks_exists() {
    let begins = ["src/", "docs/", "tests/", "testdata/", ".ci/", "../"];
    for name in pages() {
        let text = page(&name);
        let prose: Vec<&str> = prose(&text).collect();
        for word in super::code_words(&prose.join("\n")) {
            let word = word.split([' ', ':']).next().unwrap();
            if !begins.iter().any(|begin| word.starts_with(begin)) || word.contains(['*', '<', '{']) {
                continue;
            }
            assert!(root().join(word).exists(), "{name} names {word}, which does not exist");
        }
    }
}

//! The workspace's own lint: no circle of files, and no import against the direction of the layers.
//!
//! A file imports another one if a `use` or a path in its code names an item of that file. A name that a module
//! re-exports (`pub use`) counts as an import of the file that defines it. Tests are left out. Macros are read as
//! tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, UseTree, Visibility};

/// The rooms of the program, the lowest layer first. A room imports from itself and from lower layers; two rooms of one
/// layer do not import each other.
const LAYERS: [&[&str]; 11] = [
    &["error", "exit", "fault"],
    &["file"],
    &["config"],
    &["plan"],
    &["report"],
    &["host", "dataplane"],
    &["live"],
    &["control"],
    &["cli"],
    &["commands"],
    &["main", "lib"],
];

/// Crates of the workspace, by the folders of their sources; those below [`FOLDERS`] are crates too.
const CRATES: [&str; 5] = ["ecmpvpn-common/src", "ecmpvpn-ebpf/src", "ecmpvpn/src", "tests/src", "xtask/src"];
/// Folders with a crate in each subfolder.
const FOLDERS: [&str; 2] = ["tests/src/bin", "tests/suites"];

/// The words of a path, or of a module below its crate. The crate's root has none.
type Words = Vec<String>;

/// The names in one file.
#[derive(Default)]
struct Names {
    /// `use` without `pub`: the name in this file, and the path.
    imports: Vec<(String, Words)>,
    /// `pub use`: the name in this file (or `*`), and the path.
    handed_on: Vec<(String, Words)>,
    /// Paths in code.
    paths: Vec<Words>,
    /// Items that the file defines.
    items: BTreeSet<String>,
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
    })
}

fn item_name(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

impl Names {
    fn of(text: &str) -> syn::Result<Self> {
        let mut names = Self::default();
        let file = syn::parse_file(text)?;
        names.visit_file(&file);
        names.items = file.items.iter().filter_map(item_name).collect();
        Ok(names)
    }

    fn tree(&mut self, tree: &UseTree, before: &[String], is_public: bool) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.tree(&path.tree, &with(&path.ident), is_public),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(tree, before, is_public)),
            UseTree::Glob(_) => self.import("*".to_owned(), before.to_vec(), is_public),
            UseTree::Name(name) if name.ident == "self" => {
                self.import(before.last().cloned().unwrap_or_default(), before.to_vec(), is_public);
            }
            UseTree::Name(name) => self.import(name.ident.to_string(), with(&name.ident), is_public),
            UseTree::Rename(rename) => self.import(rename.rename.to_string(), with(&rename.ident), is_public),
        }
    }

    fn import(&mut self, name: String, path: Words, is_public: bool) {
        if is_public { &mut self.handed_on } else { &mut self.imports }.push((name, path));
    }

    /// Collects paths such as `a::b::c` from a macro's tokens.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path = Words::new();
        let mut colons = 0;
        for token in tokens {
            match &token {
                TokenTree::Ident(word) => {
                    if colons != 2 {
                        self.path(std::mem::take(&mut path));
                    }
                    path.push(word.to_string());
                    colons = 0;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' => colons += 1,
                other => {
                    self.path(std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.path(path);
    }

    fn path(&mut self, path: Words) {
        if !path.is_empty() {
            self.paths.push(path);
        }
    }
}

impl<'a> Visit<'a> for Names {
    fn visit_item(&mut self, item: &'a Item) {
        let is_test = match item {
            Item::Mod(module) => is_test(&module.attrs),
            Item::Fn(function) => is_test(&function.attrs),
            Item::Impl(block) => is_test(&block.attrs),
            Item::Use(item) => is_test(&item.attrs),
            _ => false,
        };
        if !is_test {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.tree(&item.tree, &[], !matches!(item.vis, Visibility::Inherited));
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.path(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'a syn::Macro) {
        self.tokens(called.tokens.clone());
    }
}

/// For each file, the files that it imports, and the names that it takes from each.
type Arrows = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// One crate's files.
#[derive(Default)]
struct House {
    /// The file of each module.
    files: BTreeMap<Words, String>,
    /// What each module re-exports: the name, or `*`, and its path.
    handed_on: BTreeMap<Words, Vec<(String, Words)>>,
    /// Items that each module's file defines.
    items: BTreeMap<Words, BTreeSet<String>>,
}

/// The module of a file, below its crate.
fn module_of(file: &str) -> Words {
    let words = file.trim_end_matches(".rs").trim_end_matches("/mod").split('/').map(str::to_owned);
    words.filter(|word| !["main", "lib", "mod"].contains(&word.as_str())).collect()
}

impl House {
    /// The arrows of a crate. `sources`: path below the crate's folder, and text.
    fn arrows(sources: &[(String, String)]) -> syn::Result<Arrows> {
        let mut house = Self::default();
        let mut named = Vec::new();
        for (file, text) in sources {
            house.files.insert(module_of(file), file.clone());
            let mut found = Names::of(text)?;
            house.items.insert(module_of(file), std::mem::take(&mut found.items));
            named.push((file, found));
        }
        for (file, names) in &named {
            let module = module_of(file);
            for (name, path) in &names.handed_on {
                if let Some(path) = house.absolute(&module, path) {
                    house.handed_on.entry(module.clone()).or_default().push((name.clone(), path));
                }
            }
        }
        let mut arrows = Arrows::new();
        for (file, names) in &named {
            let module = module_of(file);
            let imported = |(name, path): &(String, Words)| Some((name.clone(), house.absolute(&module, path)?));
            let imports: Vec<(String, Words)> = names.imports.iter().filter_map(imported).collect();
            let handed_on: Vec<(String, Words)> = names.handed_on.iter().filter_map(imported).collect();
            let used = names.paths.iter().filter_map(|path| {
                let (first, rest) = path.split_first()?;
                match imports.iter().chain(&handed_on).find(|(name, _)| name == first) {
                    Some((_, path)) => Some([path.as_slice(), rest].concat()),
                    None => house.absolute(&module, path),
                }
            });
            let used: Vec<Words> = used.collect();
            // A module may hand on what is below it; from elsewhere that is an import.
            let from_elsewhere = handed_on.iter().filter(|(_, path)| !path.starts_with(&module));
            for path in imports.iter().chain(from_elsewhere).map(|(_, path)| path).chain(&used) {
                let Some((other, name)) = house.owner(path, 0) else { continue };
                if other != **file {
                    arrows.entry((*file).clone()).or_default().entry(other).or_default().insert(name);
                }
            }
        }
        Ok(arrows)
    }

    /// A path in `module`, from the crate's root. `None`: it leads out of the crate, or to an item of the file itself.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Words> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([module, rest].concat()),
            "super" => {
                let mut base = module.len();
                let mut rest = path;
                while rest.first().is_some_and(|word| word == "super") {
                    base = base.checked_sub(1)?;
                    rest = &rest[1..];
                }
                Some([&module[..base], rest].concat())
            }
            child => {
                let inside = [module, &[child.to_owned()]].concat();
                self.files.contains_key(&inside).then(|| [module, path].concat())
            }
        }
    }

    /// The file that defines the item of a path, and the item's name. `None` for a path to a whole module: its items
    /// are named elsewhere.
    fn owner(&self, path: &[String], depth: u32) -> Option<(String, String)> {
        let length = (0..=path.len()).rev().find(|length| self.files.contains_key(&path[..*length]))?;
        let (module, rest) = path.split_at(length);
        let name = rest.first()?;
        let handed_on = self.handed_on.get(module).map_or(&[][..], Vec::as_slice);
        let has = |module: &Words| self.items.get(module).is_some_and(|items| items.contains(name));
        let whole = handed_on.iter().find(|(other, path)| other == "*" && has(path));
        let path = match handed_on.iter().find(|(other, _)| other == name) {
            Some((_, path)) => [path.as_slice(), &rest[1..]].concat(),
            None if whole.is_some() && !has(&module.to_vec()) => [whole?.1.as_slice(), rest].concat(),
            None => return Some((self.files[module].clone(), name.clone())),
        };
        if depth < 8 { self.owner(&path, depth + 1) } else { None }
    }
}

/// Files that import each other in a circle, and the arrows between them: one text for each circle.
fn circles(arrows: &Arrows) -> Vec<String> {
    let reaches = |from: &str| {
        let mut seen = BTreeSet::new();
        let mut waiting = vec![from.to_owned()];
        while let Some(file) = waiting.pop() {
            for next in arrows.get(&file).into_iter().flat_map(BTreeMap::keys) {
                if seen.insert(next.clone()) {
                    waiting.push(next.clone());
                }
            }
        }
        seen
    };
    let reach: BTreeMap<&String, BTreeSet<String>> = arrows.keys().map(|file| (file, reaches(file))).collect();
    let mutual = |a: &String, b: &String| reach[a].contains(b) && reach.get(b).is_some_and(|back| back.contains(a));
    let mut listed = BTreeSet::new();
    let mut circles = Vec::new();
    for file in arrows.keys().filter(|file| reach[file].contains(*file)) {
        if listed.contains(file) {
            continue;
        }
        let members: BTreeSet<&String> = arrows.keys().filter(|other| mutual(file, other)).collect();
        listed.extend(members.iter().copied());
        let mut text = format!("a circle of {} files", members.len());
        for (from, tos) in arrows.iter().filter(|(from, _)| members.contains(from)) {
            for (to, names) in tos.iter().filter(|(to, _)| members.contains(to)) {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                text.extend(["\n  ", from, " -> ", to, ": ", &names.join(", ")]);
            }
        }
        circles.push(text);
    }
    circles
}

/// Imports from a lower layer to a higher one, or between two rooms of one layer.
fn against_the_direction(arrows: &Arrows) -> Vec<String> {
    let room = |file: &str| file.trim_end_matches(".rs").split('/').next().unwrap_or_default().to_owned();
    let layer = |room: &str| LAYERS.iter().position(|rooms| rooms.contains(&room));
    let mut found = Vec::new();
    for (from, tos) in arrows {
        for (to, names) in tos {
            let (a, b) = (room(from), room(to));
            let problem = match (layer(&a), layer(&b)) {
                _ if a == b => continue,
                (Some(a), Some(b)) if b < a => continue,
                (Some(_), Some(_)) => "against the direction",
                _ => "of a room that has no layer",
            };
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            found.push(format!("an import {problem}: {from} -> {to}: {}", names.join(", ")));
        }
    }
    found
}

fn read(folder: &Path, below: &str, sources: &mut Vec<(String, String)>) {
    let entries = fs::read_dir(folder.join(below)).expect("a folder of sources");
    for entry in entries.map(|entry| entry.expect("an entry")) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        if entry.file_type().expect("a type").is_dir() {
            read(folder, &path, sources);
        } else if Path::new(&path).extension().is_some_and(|end| end == "rs")
            && !name.ends_with("tests.rs")
            && !path.contains("/tests/")
        {
            sources.push((path, fs::read_to_string(entry.path()).expect("a text")));
        }
    }
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn arrows_of(name: &str) -> Arrows {
    let folder = workspace().join(name);
    let mut sources = Vec::new();
    read(&folder, "", &mut sources);
    House::arrows(&sources).expect("sources that compile")
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let subfolders = |folder: &str| {
        let entries = fs::read_dir(workspace().join(folder)).expect("a folder of crates");
        entries.map(|entry| format!("{folder}/{}", entry.expect("an entry").file_name().display())).collect::<Vec<_>>()
    };
    let crates = CRATES.map(str::to_owned).into_iter().chain(FOLDERS.into_iter().flat_map(subfolders));
    let of_crate = |name: String| circles(&arrows_of(&name)).into_iter().map(move |circle| format!("{name}: {circle}"));
    let circles: Vec<String> = crates.flat_map(of_crate).collect();
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn no_import_runs_against_the_direction() {
    let found = against_the_direction(&arrows_of("ecmpvpn/src"));
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[cfg(test)]
mod on_purpose {
    use super::*;

    fn arrows(sources: &[(&str, &str)]) -> Arrows {
        let sources: Vec<(String, String)> =
            sources.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect();
        House::arrows(&sources).unwrap()
    }

    #[test]
    fn a_circle_is_found_with_its_names() {
        let arrows = arrows(&[
            ("lib.rs", "pub mod a; pub mod b; pub mod c;"),
            ("a.rs", "use crate::b::{B, Other}; pub struct A; fn f(_: crate::c::C) {}"),
            ("b.rs", "use super::a; pub struct B(a::A); pub struct Other;"),
            ("c.rs", "pub struct C; #[cfg(test)] mod tests { use crate::a::A; }"),
        ]);
        assert_eq!(circles(&arrows), ["a circle of 2 files\n  a.rs -> b.rs: B, Other\n  b.rs -> a.rs: A"]);
        assert!(arrows["a.rs"].contains_key("c.rs"));
    }

    #[test]
    fn a_name_that_is_handed_on_is_its_owners() {
        let arrows = arrows(&[
            ("lib.rs", "mod host; mod control;"),
            ("host/mod.rs", "mod link; mod all; pub use link::Link as L; pub use all::*; pub fn look() {}"),
            ("host/link.rs", "pub struct Link;"),
            ("host/all.rs", "pub struct Other;"),
            ("control.rs", "use crate::host::{self, L, Other}; fn f() { tokio::select! { _ = host::look() => {} } }"),
        ]);
        let of: Vec<&String> = arrows["control.rs"].keys().collect();
        assert_eq!(of, ["host/all.rs", "host/link.rs", "host/mod.rs"]);
    }

    #[test]
    fn a_module_that_uses_what_it_hands_on_is_found() {
        let sources = [
            ("host/mod.rs", "mod link; pub use link::Link; pub const ONE: u8 = 1; pub fn first() -> Link { Link }"),
            ("host/link.rs", "use super::ONE; pub struct Link;"),
        ];
        let found = circles(&arrows(&sources));
        assert!(found.len() == 1 && found[0].contains("host/mod.rs -> host/link.rs: Link"), "{found:?}");
    }

    #[test]
    fn handing_on_from_a_higher_layer_is_found() {
        let arrows = arrows(&[("plan/mod.rs", "pub use crate::host::Link;"), ("host/mod.rs", "pub struct Link;")]);
        let found = against_the_direction(&arrows);
        assert!(found.len() == 1 && found[0].contains("plan/mod.rs -> host/mod.rs"), "{found:?}");
    }

    #[test]
    fn an_import_against_the_direction_is_found() {
        let arrows = arrows(&[
            ("lib.rs", "pub mod plan; pub mod host; pub mod dataplane; pub mod news;"),
            ("plan/mod.rs", "use crate::host::Link;"),
            ("host/mod.rs", "use crate::plan::Plan; use crate::dataplane::Pins; pub struct Link;"),
            ("dataplane.rs", "pub struct Pins;"),
            ("news.rs", "use crate::host::Link;"),
        ]);
        let found = against_the_direction(&arrows);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("host/mod.rs -> dataplane.rs: Pins"));
        assert!(found[1].contains("no layer"));
        assert!(found[2].contains("plan/mod.rs -> host/mod.rs: Link"));
    }
}

//! Changes single values of a configuration file. Everything else in the file, including comments and order, stays as
//! it is.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid, fchown};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, Value};

use super::render::rule_text;
use super::{Config, Policy, PublicKey, Rule};
use crate::file::Draft;

/// Why the file was not changed.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// Another process has written to the file.
    #[error("{} was changed by another program meanwhile, so it was not written: repeat the command", path.display())]
    Changed { path: PathBuf },
    /// The file cannot be written.
    #[error("writing the configuration {}", path.display())]
    Unwritable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is written in a form that [`Edit`] cannot change.
    #[error("{} has {what} in a form that is not edited here: write it as {form}", path.display())]
    Form {
        path: PathBuf,
        /// The part of the file.
        what: String,
        /// The form that can be edited.
        form: &'static str,
    },
}

/// A configuration file that is being changed. Nothing is written before [`Edit::save`].
pub struct Edit {
    path: PathBuf,
    before: String,
    document: DocumentMut,
    rules: Vec<Rule>,
    /// The file for the new text. It is made first: if that fails, nothing could be saved.
    new: Draft,
}

/// New keys for a tunnel. File names are as in the configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct TunnelKeys<'a> {
    pub private_key_file: Option<&'a str>,
    /// The far end's key.
    pub public_key: Option<PublicKey>,
    pub preshared_key_file: Option<&'a str>,
}

impl Edit {
    /// Starts to edit the file at `path`. `text` is its content, and `config` is what `text` parses to.
    ///
    /// # Errors
    /// No temporary file can be made beside it, or the text is not TOML.
    pub fn new(path: &Path, text: &str, config: &Config) -> Result<Self, EditError> {
        let unwritable = |source| EditError::Unwritable { path: path.to_owned(), source };
        // A symbolic link stays a link: its target is changed.
        let target = fs::canonicalize(path).map_err(unwritable)?;
        let new = Draft::beside(&target).map_err(unwritable)?;
        let document = text.parse().map_err(|error: toml_edit::TomlError| EditError::Form {
            path: path.to_owned(),
            what: error.message().to_owned(),
            form: "TOML",
        })?;
        Ok(Self { path: target, before: text.to_owned(), document, rules: config.rules.clone(), new })
    }

    /// Sets the policy of all peers, or of one.
    ///
    /// # Errors
    /// The peers are not written as `[[peer]]`.
    pub fn set_policy(&mut self, policy: Policy, peer: Option<&str>) -> Result<(), EditError> {
        let is_named = |table: &Table| peer.is_some_and(|peer| string(table, "name") == Some(peer));
        for table in self.tables("peer", "[[peer]]")? {
            if is_named(table) {
                set(table, "policy", policy.as_str().into());
            } else if peer.is_none() {
                table.remove("policy");
            }
        }
        if peer.is_none() {
            let steering = self.document.entry("steering").or_insert_with(|| Item::Table(Table::new()));
            match steering.as_table_like_mut() {
                Some(table) => match table.get_mut("policy").and_then(Item::as_value_mut) {
                    Some(value) => replace(value, policy.as_str().into()),
                    None => drop(table.insert("policy", toml_edit::value(policy.as_str()))),
                },
                None => return Err(self.wrong_form("[steering]", "[steering]")),
            }
        }
        Ok(())
    }

    /// Sets whether order is restored for all peers, or for one.
    ///
    /// # Errors
    /// The peers are not written as `[[peer]]`.
    pub fn set_order(&mut self, restored: bool, peer: Option<&str>) -> Result<(), EditError> {
        for table in self.tables("peer", "[[peer]]")? {
            if peer.is_none_or(|peer| string(table, "name") == Some(peer)) {
                set(table, "restore_order", restored.into());
            }
        }
        Ok(())
    }

    /// Sets a tunnel's weight. `None`: `"auto"`.
    ///
    /// # Errors
    /// The tunnels are not written as `[[peer.tunnel]]`, or there is none of this name.
    pub fn set_weight(&mut self, tunnel: &str, weight: Option<u16>) -> Result<(), EditError> {
        let value: Value = weight.map_or_else(|| "auto".into(), |weight| i64::from(weight).into());
        set(self.tunnel(tunnel)?, "weight", value);
        Ok(())
    }

    fn tunnel(&mut self, name: &str) -> Result<&mut Table, EditError> {
        let missing = self.wrong_form(&format!("no tunnel {name}, or has it"), "[[peer.tunnel]]");
        let tunnels =
            self.tables("peer", "[[peer]]")?.filter_map(|peer| peer.get_mut("tunnel")?.as_array_of_tables_mut());
        let mut tunnels = tunnels.flat_map(ArrayOfTables::iter_mut);
        tunnels.find(|table| string(table, "name") == Some(name)).ok_or(missing)
    }

    /// Gives a tunnel keys of its own. Keys that are `None` stay as they are. Returns the key files that the tunnel no
    /// longer names.
    ///
    /// # Errors
    /// The tunnels are not written as `[[peer.tunnel]]`, or there is none of this name.
    pub fn set_keys(&mut self, tunnel: &str, keys: &TunnelKeys<'_>) -> Result<Vec<String>, EditError> {
        let public_key = keys.public_key.map(|key| key.to_string());
        let desired = [
            ("private_key_file", keys.private_key_file),
            ("public_key", public_key.as_deref()),
            ("preshared_key_file", keys.preshared_key_file),
        ];
        let table = self.tunnel(tunnel)?;
        let mut former = Vec::new();
        for (key, value) in desired {
            let Some(value) = value else { continue };
            let before = string(table, key).filter(|before| key.ends_with("_file") && *before != value);
            former.extend(before.map(str::to_owned));
            set(table, key, value.into());
        }
        Ok(former)
    }

    /// Adds a rule before the first rule of `behind` that is in the file, otherwise after all rules. A rule that is in
    /// the file already, as `is_same` decides, stays where it is.
    ///
    /// # Errors
    /// The rules are not written as `[[rule]]`.
    pub fn add_rule(
        &mut self,
        rule: &Rule,
        behind: &[Rule],
        is_same: impl Fn(&Rule, &Rule) -> bool,
    ) -> Result<(), EditError> {
        if self.rules.iter().any(|written| is_same(written, rule)) {
            return Ok(());
        }
        let before = behind.iter().find_map(|next| self.rules.iter().position(|written| is_same(written, next)));
        let last = last_position(self.document.as_table());
        if !self.document.contains_key("rule") {
            self.document.insert("rule", Item::ArrayOfTables(ArrayOfTables::new()));
        }
        let Some(tables) = self.document.get_mut("rule").and_then(Item::as_array_of_tables_mut) else {
            return Err(self.wrong_form("rules", "[[rule]]"));
        };
        let at = before.unwrap_or(tables.len());
        let rendered: DocumentMut = rule_text(rule).parse().expect("what is rendered is TOML");
        let mut table =
            rendered["rule"].as_array_of_tables().and_then(|rules| rules.get(0)).cloned().unwrap_or_default();
        // Tables with the same position are written in the order of the list.
        let neighbour = tables.get(at).or_else(|| tables.iter().last()).and_then(Table::position);
        table.set_position(Some(neighbour.unwrap_or(last)));
        tables.insert(at, table);
        self.rules.insert(at, rule.clone());
        Ok(())
    }

    /// Removes a rule, and the comment above it. Does nothing if the rule is not in the file.
    ///
    /// # Errors
    /// The rules are not written as `[[rule]]`.
    pub fn remove_rule(&mut self, rule: &Rule, is_same: impl Fn(&Rule, &Rule) -> bool) -> Result<(), EditError> {
        let Some(at) = self.rules.iter().position(|written| is_same(written, rule)) else { return Ok(()) };
        let Some(tables) = self.document.get_mut("rule").and_then(Item::as_array_of_tables_mut) else {
            return Err(self.wrong_form("rules", "[[rule]]"));
        };
        tables.remove(at);
        self.rules.remove(at);
        Ok(())
    }

    /// The text that [`Edit::save`] would write.
    pub fn text(&self) -> String {
        self.document.to_string()
    }

    /// Replaces the old text with the new one atomically. Mode and owner stay the same.
    ///
    /// # Errors
    /// The file changed since it was read, or it cannot be written.
    pub fn save(mut self) -> Result<(), EditError> {
        let path = self.path.clone();
        let unwritable = |source| EditError::Unwritable { path: path.clone(), source };
        let before = fs::metadata(&self.path).map_err(unwritable)?;
        let text = self.text();
        self.new.write(text.as_bytes()).map_err(unwritable)?;
        let (uid, gid) = (Uid::from_raw(before.uid()), Gid::from_raw(before.gid()));
        fchown(self.new.file().as_fd(), Some(uid), Some(gid)).map_err(|error| unwritable(error.into()))?;
        let mode = fs::Permissions::from_mode(before.permissions().mode());
        self.new.file().set_permissions(mode).map_err(unwritable)?;
        self.new.sync().map_err(unwritable)?;
        if fs::read(&self.path).map_err(unwritable)? != self.before.as_bytes() {
            return Err(EditError::Changed { path });
        }
        self.new.replace(&self.path).map_err(unwritable)
    }

    fn tables(&mut self, key: &str, form: &'static str) -> Result<impl Iterator<Item = &mut Table>, EditError> {
        let error = self.wrong_form(&format!("its {key}s"), form);
        self.document.get_mut(key).and_then(Item::as_array_of_tables_mut).map(ArrayOfTables::iter_mut).ok_or(error)
    }

    fn wrong_form(&self, what: &str, form: &'static str) -> EditError {
        EditError::Form { path: self.path.clone(), what: what.to_owned(), form }
    }
}

fn string<'t>(table: &'t Table, key: &str) -> Option<&'t str> {
    table.get(key).and_then(Item::as_str)
}

/// Sets a key. White space and comments around the value stay.
fn set(table: &mut Table, key: &str, new: Value) {
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(value) => replace(value, new),
        None => drop(table.insert(key, Item::Value(new))),
    }
}

fn replace(value: &mut Value, mut new: Value) {
    *new.decor_mut() = value.decor().clone();
    *value = new;
}

/// The position of the last table in the document.
fn last_position(table: &Table) -> isize {
    let below = table.iter().flat_map(|(_, item)| -> Vec<isize> {
        match item {
            Item::Table(table) => vec![last_position(table)],
            Item::ArrayOfTables(tables) => tables.iter().map(last_position).collect(),
            _ => Vec::new(),
        }
    });
    below.fold(table.position().unwrap_or(0), isize::max)
}

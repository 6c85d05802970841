//! Options of a kernel: what a recipe asks for, and what the kernel's rules made of it.
//!
//! Kconfig drops an option whose dependencies are not met, and forces others, without a word that stops
//! a build. So the final configuration is compared with the list, and every difference is named.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;

use thiserror::Error;

/// What an option that is not set is worth. So is one that is not there at all.
const NOT_SET: &str = "n";

/// Options by name, `CONFIG_` included; an option that is not set is [`NOT_SET`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads lines `CONFIG_X=value` and `# CONFIG_X is not set`; other comments are none of them.
    pub(crate) fn parse(text: &[u8]) -> Result<Options, OptionsError> {
        let text = String::from_utf8_lossy(text);
        let mut options = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            let Some((name, value)) = option(line) else {
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                return Err(OptionsError::Line {
                    number: index + 1,
                    line: line.to_owned(),
                });
            };
            match options.entry(name.to_owned()) {
                Entry::Vacant(place) => {
                    place.insert(value.to_owned());
                }
                Entry::Occupied(_) => {
                    return Err(OptionsError::Twice {
                        number: index + 1,
                        name: name.to_owned(),
                    });
                }
            }
        }
        Ok(Options(options))
    }

    /// Fails with every option of this list that is something else in `result`.
    pub(crate) fn check(&self, result: &Options) -> Result<(), OptionsError> {
        let mut differences = String::new();
        let mut count = 0;
        for (name, asked) in &self.0 {
            let found = result.0.get(name).map_or(NOT_SET, String::as_str);
            if found != asked {
                let separator = if count == 0 { "" } else { "; " };
                // Writing to a string does not fail.
                write!(
                    differences,
                    "{separator}{name} is {}, asked for: {}",
                    shown(found),
                    shown(asked)
                )
                .unwrap_or_default();
                count += 1;
            }
        }
        if count == 0 {
            return Ok(());
        }
        Err(OptionsError::Differ { count, differences })
    }
}

fn option(line: &str) -> Option<(&str, &str)> {
    let (name, value) = match line.strip_prefix("# ") {
        Some(comment) => (comment.strip_suffix(" is not set")?, NOT_SET),
        None => line.split_once('=')?,
    };
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (name.starts_with("CONFIG_") && name.bytes().all(word)).then_some((name, value))
}

fn shown(value: &str) -> &str {
    if value == NOT_SET { "not set" } else { value }
}

/// The options are not what they should be.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// A line that asks for nothing.
    #[error(
        "line {number} of the kernel's options is neither an option nor a comment: {line:?}; write CONFIG_X=y or `# CONFIG_X is not set`"
    )]
    Line {
        /// Counted from 1.
        number: usize,
        /// The line.
        line: String,
    },
    /// An option that has two values.
    #[error("line {number} of the kernel's options gives {name} again: remove one of the lines")]
    Twice {
        /// Counted from 1.
        number: usize,
        /// The option.
        name: String,
    },
    /// `make olddefconfig` made something else of them.
    #[error(
        "{count} of the kernel's options did not come out as asked: {differences}. Ask for what the option depends on, or take it off the list when something else needs it as it is"
    )]
    Differ {
        /// How many.
        count: usize,
        /// Each of them.
        differences: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Options {
        Options::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn what_came_out_as_asked_passes() {
        let asked = "# Why\nCONFIG_A=y\n\n# CONFIG_B is not set\nCONFIG_C=n\nCONFIG_N=16\nCONFIG_S=\"a b\"\n";
        let result = "#\n# Automatically generated\n#\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=16\nCONFIG_S=\"a b\"\nCONFIG_MORE=y\n";
        options(asked).check(&options(result)).unwrap();
    }

    #[test]
    fn every_option_that_was_dropped_forced_or_changed_is_named() {
        let asked = "CONFIG_KEPT=y\nCONFIG_DROPPED=y\nCONFIG_GONE=y\n# CONFIG_FORCED is not set\nCONFIG_NUMBER=16\n";
        let result =
            "CONFIG_KEPT=y\n# CONFIG_DROPPED is not set\nCONFIG_FORCED=y\nCONFIG_NUMBER=8\n";
        let error = options(asked).check(&options(result)).unwrap_err();
        let text = error.to_string();
        for named in [
            "4 of the kernel's options",
            "CONFIG_DROPPED is not set, asked for: y",
            "CONFIG_GONE is not set, asked for: y",
            "CONFIG_FORCED is y, asked for: not set",
            "CONFIG_NUMBER is 8, asked for: 16",
        ] {
            assert!(text.contains(named), "{named:?} is not in {text}");
        }
        assert!(!text.contains("CONFIG_KEPT"), "{text}");
    }

    #[test]
    fn a_line_that_asks_for_nothing_is_refused() {
        for line in ["CONFIG_A", "A=y", "config_a=y", "CONFIG_A-B=y", "hello"] {
            let error = Options::parse(format!("\n{line}\n").as_bytes()).unwrap_err();
            assert!(error.to_string().contains("line 2"), "{error}");
            assert!(error.to_string().contains(line), "{error}");
        }
    }

    #[test]
    fn an_option_that_is_given_twice_is_refused() {
        let text = "CONFIG_A=y\n# CONFIG_A is not set\n";
        let error = Options::parse(text.as_bytes()).unwrap_err();
        assert!(
            error.to_string().contains("line 2") && error.to_string().contains("CONFIG_A"),
            "{error}"
        );
    }

    #[test]
    fn the_lists_of_all_recipes_of_forkvm_are_lists() {
        for name in crate::built_in() {
            let recipe = crate::Recipe::find(name).unwrap();
            let list = Options::parse(recipe.file(&recipe.kernel().config)).unwrap();
            assert!(list.0.len() > 100, "{name}");
        }
    }
}

//! The command line: words of the form `key=value`.

/// The words of a command line.
#[derive(Clone, Copy)]
pub struct Args<'a>(&'a str);

impl<'a> Args<'a> {
    /// The words of `command_line`, which are apart by blanks.
    pub fn new(command_line: &'a str) -> Args<'a> {
        Args(command_line)
    }

    /// Value of the first word `key=…`.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        let value = |word: &'a str| word.strip_prefix(key)?.strip_prefix('=');
        self.0.split_ascii_whitespace().find_map(value)
    }

    /// Value of `key` as a decimal number, or `default` when it is not there.
    ///
    /// # Panics
    /// When it is there and not a number: a job that runs with something else than it was told
    /// would be worse.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        match self.text(key) {
            None => default,
            Some(text) => match text.parse() {
                Ok(number) => number,
                Err(_) => panic!("{key}={text} on the command line is not a number"),
            },
        }
    }

    /// Whether `key` is there with a number other than 0.
    pub fn flag(&self, key: &str) -> bool {
        self.number(key, 0) != 0
    }
}

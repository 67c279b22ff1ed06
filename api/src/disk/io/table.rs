//! The commands there are: what they are called, how many arguments they take, and how they are
//! explained. Names and words are qemu-io's.

/// One command.
pub struct Command {
    pub name: &'static str,
    pub alias: &'static str,
    /// Fewest and most arguments, options included; `None` for any number.
    pub least: usize,
    pub most: Option<usize>,
    /// Its letters, as [`super::options::Options::read`] takes them.
    pub options: &'static str,
    /// Works without an image.
    pub without_image: bool,
    pub arguments: &'static str,
    pub explanation: &'static str,
}

const fn command(
    name: &'static str,
    (least, most): (usize, Option<usize>),
    options: &'static str,
    arguments: &'static str,
    explanation: &'static str,
) -> Command {
    Command {
        name,
        alias: "",
        least,
        most,
        options,
        without_image: false,
        arguments,
        explanation,
    }
}

const fn alone(command: Command, alias: &'static str) -> Command {
    Command {
        alias,
        without_image: true,
        ..command
    }
}

const fn also(command: Command, alias: &'static str) -> Command {
    Command { alias, ..command }
}

/// All of them, in the order of their names.
pub const COMMANDS: &[Command] = &[
    command(
        "aio_flush",
        (0, Some(0)),
        "",
        "",
        "completes all outstanding aio requests",
    ),
    command(
        "aio_read",
        (2, None),
        "CP:iqv",
        "[-Ciqv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
    ),
    command(
        "aio_write",
        (2, None),
        "CfiP:quz",
        "[-Cfiquz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
    ),
    command(
        "alloc",
        (1, Some(2)),
        "",
        "offset [count]",
        "checks if offset is allocated in the file",
    ),
    also(
        command("close", (0, Some(0)), "", "", "close the current open file"),
        "c",
    ),
    also(
        command(
            "discard",
            (2, None),
            "Cq",
            "[-Cq] off len",
            "discards a number of bytes at a specified offset",
        ),
        "d",
    ),
    also(
        command(
            "flush",
            (0, Some(0)),
            "",
            "",
            "flush all in-core file state to disk",
        ),
        "f",
    ),
    alone(
        command(
            "help",
            (0, Some(1)),
            "",
            "[command]",
            "help for one or all commands",
        ),
        "?",
    ),
    also(
        command(
            "info",
            (0, Some(0)),
            "",
            "",
            "prints information about the current file",
        ),
        "i",
    ),
    also(
        command(
            "length",
            (0, Some(0)),
            "",
            "",
            "gets the length of the current file",
        ),
        "l",
    ),
    command(
        "map",
        (0, Some(1)),
        "",
        "",
        "prints the allocated areas of a file",
    ),
    alone(
        command(
            "open",
            (0, None),
            "rsnkUt:d:o:C",
            "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open the file specified by path",
        ),
        "o",
    ),
    alone(
        command("quit", (0, Some(0)), "", "", "exit the program"),
        "q",
    ),
    also(
        command(
            "read",
            (2, None),
            "bCl:pP:qs:v",
            "[-abCqv] [-P pattern [-s off] [-l len]] off len",
            "reads a number of bytes at a specified offset",
        ),
        "r",
    ),
    also(
        command(
            "readv",
            (2, None),
            "CP:qv",
            "[-Cqv] [-P pattern] off len [len..]",
            "reads a number of bytes at a specified offset",
        ),
        "rv",
    ),
    command(
        "reopen",
        (0, None),
        "c:o:rw",
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
    ),
    alone(
        command("sigraise", (1, Some(1)), "", "signal", "raises a signal"),
        "",
    ),
    alone(
        command(
            "sleep",
            (1, Some(1)),
            "",
            "",
            "waits for the given value in milliseconds",
        ),
        "",
    ),
    also(
        command(
            "truncate",
            (1, Some(3)),
            "m:",
            "[-m prealloc_mode] off",
            "truncates the current file at the given offset",
        ),
        "t",
    ),
    also(
        command(
            "write",
            (2, None),
            "bcCfnpP:qs:uz",
            "[-bcCfnquz] [-P pattern | -s source_file] off len",
            "writes a number of bytes at a specified offset",
        ),
        "w",
    ),
    also(
        command(
            "writev",
            (2, None),
            "CfqP:",
            "[-Cfq] [-P pattern] off len [len..]",
            "writes a number of bytes at a specified offset",
        ),
        "wv",
    ),
];

impl Command {
    /// The one with this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        let named =
            |command: &&Self| command.name == name || (!name.is_empty() && command.alias == name);
        COMMANDS.iter().find(named)
    }

    /// Its line in the list of all.
    pub fn usage(&self) -> String {
        format!("{} {} -- {}\n", self.name, self.arguments, self.explanation)
            .replace("  --", if self.name == "map" { "  --" } else { " --" })
    }

    /// What is said when it has `count` arguments, if that is wrong.
    pub fn refuses(&self, count: usize) -> Option<String> {
        if count >= self.least && self.most.is_none_or(|most| count <= most) {
            return None;
        }
        let expected = match self.most {
            None => format!("at least {}", self.least),
            Some(most) if most == self.least => most.to_string(),
            Some(most) => format!("between {} and {most}", self.least),
        };
        Some(format!(
            "bad argument count {count} to {}, expected {expected} arguments",
            self.name
        ))
    }
}

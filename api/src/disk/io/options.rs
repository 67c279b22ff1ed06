//! Options of a command, as getopt reads them: `-q`, `-P 5`, `-qP5`, in any order, with what is no
//! option left over.

/// What stood on the line behind the command's name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options<'a> {
    given: Vec<(char, &'a str)>,
    /// What is no option.
    pub rest: Vec<&'a str>,
}

/// Why a line could not be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unknown {
    /// There is no such option.
    Option(char),
    /// It wants an argument.
    Argument(char),
}

impl<'a> Options<'a> {
    /// Reads a line by `known`: a letter for each option, a colon behind those with an argument.
    pub fn read(known: &str, line: &[&'a str]) -> Result<Self, Unknown> {
        let mut options = Self::default();
        let mut words = line.iter().copied();
        while let Some(word) = words.next() {
            if word == "--" {
                options.rest.extend(words.by_ref());
                break;
            }
            let Some(mut letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty())
            else {
                options.rest.push(word);
                continue;
            };
            while let Some(letter) = letters.chars().next() {
                letters = &letters[letter.len_utf8()..];
                let place = known.find(letter).filter(|_| letter != ':');
                let place = place.ok_or(Unknown::Option(letter))?;
                let argument = match known[place + letter.len_utf8()..].starts_with(':') {
                    false => "",
                    true if !letters.is_empty() => std::mem::take(&mut letters),
                    true => words.next().ok_or(Unknown::Argument(letter))?,
                };
                options.given.push((letter, argument));
            }
        }
        Ok(options)
    }

    /// Whether an option was given.
    pub fn has(&self, letter: char) -> bool {
        self.get(letter).is_some()
    }

    /// All of them, in the order in which they were given.
    pub fn all(&self) -> impl Iterator<Item = (char, &'a str)> {
        self.given.iter().copied()
    }

    /// Its argument; the last, if it was given more than once.
    pub fn get(&self, letter: char) -> Option<&'a str> {
        let found = self.given.iter().rev().find(|(given, _)| *given == letter);
        found.map(|(_, argument)| *argument)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_getopt_reads_them() {
        let read = |line: &'static str| {
            let words: Vec<&str> = line.split(' ').collect();
            Options::read("qP:z", &words)
        };
        let options = read("-q 0 -P5 512 -z").unwrap();
        assert_eq!(options.rest, ["0", "512"]);
        assert!(options.has('q') && options.has('z') && !options.has('C'));
        assert_eq!(options.get('P'), Some("5"));
        assert_eq!(read("-qP 7 0").unwrap().get('P'), Some("7"));
        assert_eq!(read("-P 1 -P 2").unwrap().get('P'), Some("2"));
        assert_eq!(read("-- -q").unwrap().rest, ["-q"]);
        assert_eq!(read("- 1").unwrap().rest, ["-", "1"]);
        assert_eq!(read("-x"), Err(Unknown::Option('x')));
        assert_eq!(read("-:"), Err(Unknown::Option(':')));
        assert_eq!(read("-1"), Err(Unknown::Option('1')));
        assert_eq!(read("0 -P"), Err(Unknown::Argument('P')));
    }
}

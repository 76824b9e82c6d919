//! Lists of layers as text, by number or by rule: `0+1`, `0-3+last2`, `odd`, `every4`.

use std::fmt;

/// Some layers of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layers(Vec<Item>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    /// From the first number to the second, both included.
    Range(usize, usize),
    /// 1, 3, 5, …
    Odd,
    /// 0, 2, 4, …
    Even,
    /// 0, N, 2N, …
    Every(usize),
    /// The first N.
    First(usize),
    /// The last N.
    Last(usize),
    /// All of them.
    All,
}

/// What a list of layers is written like, for messages.
pub(super) const GRAMMAR: &str =
    "`none`, or layers joined by `+`: a number, `0-3`, `odd`, `even`, `every4`, `first2`, `last2`, `all`";

impl Layers {
    /// Parses a list; its items are joined by `+` or `,`.
    ///
    /// # Errors
    /// A sentence that says which item cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Layers::default());
        }
        text.split(['+', ',']).map(Item::parse).collect::<Result<_, _>>().map(Layers)
    }

    /// Whether none are named.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `layer` of `layers` is among them.
    pub fn contains(&self, layer: usize, layers: usize) -> bool {
        self.0.iter().any(|item| match *item {
            Item::Range(first, last) => (first..=last).contains(&layer),
            Item::Odd => layer % 2 == 1,
            Item::Even => layer.is_multiple_of(2),
            Item::Every(step) => layer.is_multiple_of(step),
            Item::First(n) => layer < n,
            Item::Last(n) => layer + n >= layers,
            Item::All => true,
        })
    }

    /// How many of `layers` are among them.
    pub fn count(&self, layers: usize) -> usize {
        (0..layers).filter(|&layer| self.contains(layer, layers)).count()
    }

    /// Checks that a model of `layers` layers has all that are named.
    ///
    /// # Errors
    /// A sentence that names the first one that is missing.
    pub fn check(&self, layers: usize) -> Result<(), String> {
        for item in &self.0 {
            let missing = match *item {
                Item::Range(_, last) if last >= layers => format!("there is no layer {last}"),
                Item::First(n) | Item::Last(n) if n > layers => format!("there are no {n} layers"),
                _ => continue,
            };
            return Err(format!("{missing}: the model has {layers}, numbered from 0"));
        }
        Ok(())
    }
}

impl Item {
    fn parse(text: &str) -> Result<Item, String> {
        let number = |digits: &str| digits.parse::<usize>().ok().filter(|&n| n < 1 << 20);
        let counted = |word: &str| text.strip_prefix(word).and_then(number).filter(|&n| n > 0);
        let range = || {
            let (first, last) = text.split_once('-')?;
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Item::Range(first, last))
        };
        let item = match text {
            "odd" => Some(Item::Odd),
            "even" => Some(Item::Even),
            "all" => Some(Item::All),
            _ => number(text).map(|n| Item::Range(n, n)),
        };
        item.or_else(range)
            .or_else(|| counted("every").map(Item::Every))
            .or_else(|| counted("first").map(Item::First))
            .or_else(|| counted("last").map(Item::Last))
            .ok_or_else(|| format!("`{text}` is not a layer; expected {GRAMMAR}"))
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, item) in self.0.iter().enumerate() {
            f.write_str(if i > 0 { "+" } else { "" })?;
            match *item {
                Item::Range(first, last) if first == last => write!(f, "{first}")?,
                Item::Range(first, last) => write!(f, "{first}-{last}")?,
                Item::Odd => f.write_str("odd")?,
                Item::Even => f.write_str("even")?,
                Item::Every(n) => write!(f, "every{n}")?,
                Item::First(n) => write!(f, "first{n}")?,
                Item::Last(n) => write!(f, "last{n}")?,
                Item::All => f.write_str("all")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_rules_name_the_layers_they_say() {
        for (text, canonical, expected) in [
            ("none", "none", &[][..]),
            ("0,1", "0+1", &[0, 1]),
            ("0+4", "0+4", &[0, 4]),
            ("1-3", "1-3", &[1, 2, 3]),
            ("odd", "odd", &[1, 3, 5]),
            ("even", "even", &[0, 2, 4]),
            ("every4", "every4", &[0, 4]),
            ("first2+last2", "first2+last2", &[0, 1, 4, 5]),
            ("all", "all", &[0, 1, 2, 3, 4, 5]),
        ] {
            let layers = Layers::parse(text).unwrap();
            let named: Vec<_> = (0..6).filter(|&l| layers.contains(l, 6)).collect();
            assert_eq!((named.as_slice(), layers.to_string().as_str()), (expected, canonical), "{text}");
            assert_eq!(layers.count(6), expected.len());
            assert_eq!(Layers::parse(&layers.to_string()).unwrap(), layers);
            layers.check(6).unwrap();
        }
    }

    #[test]
    fn what_is_no_list_or_names_no_layer_is_refused() {
        for text in ["", "x", "3-1", "every0", "every", "first", "1++2", "-1", "99999999999999999999"] {
            let message = Layers::parse(text).unwrap_err();
            assert!(message.contains("every4"), "{text}: {message}");
        }
        for (text, says) in [("40", "no layer 40"), ("2-30", "no layer 30"), ("last31", "no 31 layers")] {
            let message = Layers::parse(text).unwrap().check(30).unwrap_err();
            assert!(message.contains(says) && message.contains("has 30"), "{message}");
        }
    }
}

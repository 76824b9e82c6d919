//! The text of a KV dtype: one name for keys and values (`int8`), or one each (`k=int8,v=int4`), with options
//! (`int8+rotate`). Names come from the engine; what options there are is its affair.

/// The one spelling of `text`: keys first, no blanks, a single name where both sides are the same. None where keys and values
/// are not given once each.
pub fn canonical(text: &str) -> Option<String> {
    let (mut keys, mut values) = (None, None);
    if !text.contains('=') {
        let name = trimmed(text);
        return (!name.contains(',')).then_some(name);
    }
    for part in text.split(',') {
        let (side, name) = part.split_once('=')?;
        let place = match side.trim() {
            "k" => &mut keys,
            "v" => &mut values,
            _ => return None,
        };
        if place.replace(trimmed(name)).is_some() {
            return None;
        }
    }
    let (keys, values) = (keys?, values?);
    Some(if keys == values { keys } else { format!("k={keys},v={values}") })
}

/// A name and its options without blanks around them.
fn trimmed(side: &str) -> String {
    side.split('+').map(str::trim).collect::<Vec<_>>().join("+")
}

/// The names in a KV dtype, without options.
pub fn formats(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(|part| {
        let name = part.split_once('=').map_or(part, |(_, name)| name);
        name.split('+').next().unwrap_or_default().trim()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_have_one_form() {
        for (text, wanted) in [
            ("bf16", Some("bf16")),
            (" int8 + rotate ", Some("int8+rotate")),
            ("k=int8,v=q4_0", Some("k=int8,v=q4_0")),
            ("v=q4_0 , k = int8+rotate+centre", Some("k=int8+rotate+centre,v=q4_0")),
            ("k=int8,v=int8", Some("int8")),
            ("k=int8", None),
            ("k=int8,k=int4", None),
            ("k=int8,v=int4,v=int4", None),
            ("int8,int4", None),
            ("k=int8,int4", None),
            ("q=int8,v=int4", None),
        ] {
            assert_eq!(canonical(text).as_deref(), wanted, "{text}");
        }
        assert_eq!(formats("k=int8+rotate, v=q4_0").collect::<Vec<_>>(), ["int8", "q4_0"]);
        assert_eq!(formats("lm4+plain").collect::<Vec<_>>(), ["lm4"]);
    }
}

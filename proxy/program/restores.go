package program

// Restores is what iptables-restore was given for a family, and how often in vain.
type Restores struct {
	// Failures is how often a family could not be programmed; Partial how often of these a change alone was to be written, after
	// which all is read and compared.
	Failures, Partial uint64
	// Rules are those of the proxy's chains, by table; Last those that were written last.
	Rules, Last map[string]int
}

// Package config is the configuration of `berth serve`: defaults, over them /etc/berth/config.yaml, over that the files
// of /etc/berth/config.d in the order of their names, over all the flags.
//
// A file is a mapping of the names of the flags, in camel case:
//
//	root: /var/lib/berth
//	cniBin: [/opt/cni/bin, /usr/lib/cni]
//	logLevel: debug
//
// It promises that nothing in a file is silently ignored: an unknown name is refused with file, line and the nearest name
// that is known, a wrong value with file, line, name and value. A missing default file is none.
//
//	c, err := config.Load(config.Files("", "/etc/berth"), flags)
package config

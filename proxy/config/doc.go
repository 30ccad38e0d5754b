// Package config reads what kube-proxy 1.37 is configured by: a file of KubeProxyConfiguration v1alpha1 (as in kubeadm's
// ConfigMap), or its flags.
//
// It promises that nothing is silently ignored. An unknown field or one that is there twice is refused with file, line and
// the nearest name that is known, a bad value with file, line, field and value, in all places at once: kube-proxy goes on
// with a warning where a field is unknown. Defaults, bounds and precedence are kube-proxy's: beside --config other flags do
// not count, but for --hostname-override, --master and -v. Which of them do not, and what has no effect in berth, is told
// (Config.Ignored, Config.Unused).
//
// It differs from kube-proxy in the default of mode: where none is given, that is nftables (and node ports are served at all
// addresses of the node, as kube-proxy does where no mode is given).
//
//	var flags config.Flags
//	flags.Add(cmd.Flags())
//	c, err := flags.Load()
//	m, err := model.New(c.Model("node-1", true, true))
package config

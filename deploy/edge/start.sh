#!/bin/sh
# Starts the edge: writes nginx's configuration from the settings EDGE_… (.env.example names them), and becomes nginx.
# --render DIRECTORY writes the configuration there, and ends.
set -eu

HERE=${EDGE_TEMPLATE_DIRECTORY:-/etc/distributor-edge}
TLS=${EDGE_TLS_FILES:-/etc/nginx/tls}
TARGET=/etc/nginx/conf.d
[ "${1:-}" != --render ] || TARGET=$2

refuse() {
    echo "edge: $1" >&2
    exit 2
}

# switch NAME: its value, on or off.
switch() {
    eval "value=\${$1:-off}"
    case $value in
    on | off) echo "$value" ;;
    *) refuse "$1: expected on or off, got '$value'" ;;
    esac
}

# number NAME DEFAULT: its value, a whole number.
number() {
    eval "value=\${$1:-$2}"
    case $value in
    '' | *[!0-9]*) refuse "$1: expected a whole number, got '$value'" ;;
    *) echo "$value" ;;
    esac
}

version=$(nginx -v 2>&1 | sed 's/^.*nginx\///; s/[^0-9.].*$//')
# newer MAJOR MINOR PATCH: whether this nginx is, or is that one.
newer() {
    echo "$version" | awk -F. -v a="$1" -v b="$2" -v c="$3" '{exit !($1*1000000+$2*1000+$3 >= a*1000000+b*1000+c)}'
}

proxy_protocol=$(switch EDGE_PROXY_PROTOCOL)
redirect=$(switch EDGE_HTTPS_REDIRECT)
http3=$(switch EDGE_HTTP3)
hsts=$(number EDGE_HSTS 0)
tls_port=$(number EDGE_TLS_PORT 8443)
number EDGE_CONNECTIONS_PER_ADDRESS 64 >/dev/null

trusted=""
for proxy in ${EDGE_TRUSTED_PROXIES:-}; do
    case $proxy in
    *[!0-9A-Fa-f.:/]*) refuse "EDGE_TRUSTED_PROXIES: expected addresses and networks such as 10.0.0.0/8, got '$proxy'" ;;
    esac
    trusted="$trusted    set_real_ip_from $proxy;
"
done
header=${EDGE_CLIENT_ADDRESS_HEADER:-X-Forwarded-For}
case $header in
*[!A-Za-z0-9-]*) refuse "EDGE_CLIENT_ADDRESS_HEADER: expected the name of a header, got '$header'" ;;
esac
if [ "$proxy_protocol" = on ]; then
    # Anyone who may connect could claim any address otherwise.
    [ -n "$trusted" ] || refuse "EDGE_PROXY_PROTOCOL: on needs EDGE_TRUSTED_PROXIES, the addresses that the balancer connects from"
    [ "$http3" = off ] || refuse "EDGE_HTTP3: cannot be on together with EDGE_PROXY_PROTOCOL"
    header=proxy_protocol
fi

# Several nodes: one group, in which an object has a place of its own. A node that fails is left out, and the next in line
# is asked in its place.
EDGE_UPSTREAM_GROUP=""
nodes=0
servers=""
for node in ${EDGE_UPSTREAMS:-}; do
    case $node in
    *[!A-Za-z0-9.:_-]* | *[!0-9]*:*[!0-9]* | :* | *: | *:*:*) refuse "EDGE_UPSTREAMS: expected HOST:PORT, got '$node'" ;;
    *:*) ;;
    *) refuse "EDGE_UPSTREAMS: expected HOST:PORT, got '$node'" ;;
    esac
    nodes=$((nodes + 1))
    again=""
    case $node in
    # A name whose address may change: asked for again, where this nginx can do that.
    *[A-Za-z]*) ! newer 1 27 3 || again=" resolve" ;;
    esac
    servers="$servers    server $node max_fails=2 fail_timeout=5s$again;
"
done
case ${EDGE_BALANCE:-hash} in
hash) balance='hash $edge_object consistent;' ;;
least_conn) balance="least_conn;" ;;
*) refuse "EDGE_BALANCE: expected hash or least_conn, got '$EDGE_BALANCE'" ;;
esac
if [ "$nodes" -gt 0 ]; then
    [ -z "${EDGE_SENDFILE_TYPE:-}" ] || refuse "EDGE_UPSTREAMS: cannot be set together with ACCEL_REDIRECT_PREFIX, since the nodes' volumes are not here"
    EDGE_UPSTREAM_GROUP="upstream nodes {
    zone nodes 256k;
    $balance
$servers}"
fi
export EDGE_UPSTREAM_GROUP

# Listeners: IPv6 where the kernel has it; TLS where there is a certificate, unless a file in the directory brings its own.
listen="backlog=1024"
[ "$proxy_protocol" = off ] || listen="$listen proxy_protocol"
addresses="8080"
[ ! -e /proc/net/if_inet6 ] || addresses="8080 [::]:8080"
listeners=""
for address in $addresses; do
    listeners="$listeners    listen $address $listen;
"
done
own_files=no
for file in "$TLS"/*.conf; do
    [ ! -e "$file" ] || own_files=yes
done
tls=off
if [ "$own_files" = yes ]; then
    tls=on
    [ "$http3" = off ] || refuse "EDGE_HTTP3: cannot be on together with a .conf file in EDGE_TLS_DIRECTORY, which has to say it itself"
elif [ -e "$TLS/certificate.pem" ]; then
    tls=on
    for file in certificate.pem key.pem; do
        [ -r "$TLS/$file" ] || refuse "EDGE_TLS_DIRECTORY: expected $file to be readable by user $(id -u)"
    done
    for address in $(echo "$addresses" | sed 's/8080/8443/g'); do
        if newer 1 25 1; then
            listeners="$listeners    listen $address ssl $listen;
"
        else
            listeners="$listeners    listen $address ssl http2 $listen;
"
        fi
        [ "$http3" = off ] || listeners="$listeners    listen $address quic reuseport;
"
    done
    ! newer 1 25 1 || listeners="$listeners    http2 on;
"
    if [ "$http3" = on ]; then
        nginx -V 2>&1 | grep -q -- --with-http_v3_module || refuse "EDGE_HTTP3: this nginx ($version) has no HTTP/3"
        listeners="$listeners    http3 on;
"
    fi
    listeners="$listeners    ssl_certificate $TLS/certificate.pem;
    ssl_certificate_key $TLS/key.pem;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers off;
    ssl_session_cache shared:tls:10m;
    ssl_session_timeout 1d;
    ssl_session_tickets off;
"
else
    [ "$http3" = off ] || refuse "EDGE_HTTP3: on needs certificate.pem and key.pem in EDGE_TLS_DIRECTORY"
    [ "$redirect" = off ] || [ -n "$trusted" ] || refuse "EDGE_HTTPS_REDIRECT: on needs TLS, here or at a balancer (EDGE_TRUSTED_PROXIES)"
fi

EDGE_LISTENERS=$listeners
EDGE_REAL_IP=""
# A balancer that ends TLS says so; a client that says so itself only loses its own redirect.
EDGE_SCHEMES="default \$scheme;"
if [ -n "$trusted" ]; then
    EDGE_REAL_IP="$trusted    real_ip_header $header;
    real_ip_recursive on;"
    EDGE_SCHEMES="default \$scheme; \"http:https\" https;"
fi
port=":$tls_port"
[ "$tls_port" != 443 ] || port=""
[ "$tls" = on ] || port=""
EDGE_REDIRECTS="default \"\";"
[ "$redirect" = off ] || EDGE_REDIRECTS="default \"\"; http https://\$host$port\$request_uri;"
EDGE_HSTS_VALUES="default \"\";"
[ "$hsts" = 0 ] || EDGE_HSTS_VALUES="default \"\"; https max-age=$hsts;"
EDGE_ALT_SVC_VALUES="default \"\";"
[ "$http3" = off ] || EDGE_ALT_SVC_VALUES="default \"\"; https 'h3=\":$tls_port\"; ma=86400';"
EDGE_TLS_INCLUDE=$TLS
export EDGE_LISTENERS EDGE_REAL_IP EDGE_SCHEMES EDGE_REDIRECTS EDGE_HSTS_VALUES EDGE_ALT_SVC_VALUES EDGE_TLS_INCLUDE

# Nothing but these: nginx's own variables look the same.
names=$(grep -o '\${EDGE_[A-Z_]*}' "$HERE/distributor.conf.template" | sort -u)
# Without EDGE_UPSTREAMS the name `api` is asked for its addresses again and again.
api='http://$api:3334'
[ "$nodes" = 0 ] || api=http://nodes
envsubst "$names" <"$HERE/distributor.conf.template" | sed "s|http://[$]api:3334|$api|" >"$TARGET/distributor.conf"

[ "${1:-}" != --render ] || exit 0
exec nginx -g "daemon off; worker_processes $(number EDGE_WORKERS 2);"
